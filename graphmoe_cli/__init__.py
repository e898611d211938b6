"""The command line ``graphmoe``, which is ``python -m graphmoe_cli`` too.

Modules beside `graphmoe_cli.runs` know what can be asked, and import no more than Typer and `graphmoe_tables`: help and
refusals come at once. What a command then does is in `graphmoe_cli.runs`, which imports PyTorch, PEFT and Transformers
and is itself imported when a command runs.
"""
