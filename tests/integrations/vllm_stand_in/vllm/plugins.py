"""Plugins: every entry point of the group is loaded and called, once in a process."""

from importlib.metadata import entry_points

DEFAULT_PLUGINS_GROUP = "vllm.general_plugins"
plugins_loaded = False


def load_general_plugins() -> None:
    global plugins_loaded
    if plugins_loaded:
        return
    plugins_loaded = True
    for plugin in entry_points(group=DEFAULT_PLUGINS_GROUP):
        plugin.load()()
