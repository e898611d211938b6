"""``python -m graphmoe_cli``."""

from graphmoe_cli.app import main

if __name__ == "__main__":
    main()
