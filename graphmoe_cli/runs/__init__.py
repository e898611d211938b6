"""What each command does once its options are known to be right: imported when it runs, as it loads PyTorch."""
