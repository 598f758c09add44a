"""What differs by device and operating system."""
