"""What is measured: answers, disparities and their intervals, and utility."""
