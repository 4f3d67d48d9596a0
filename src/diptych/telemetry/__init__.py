"""What the system tells about itself: journal, metrics, logging."""
