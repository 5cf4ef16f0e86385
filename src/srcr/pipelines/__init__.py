"""What people ask for, each as about ten plain steps: open, resolve, run, record."""
