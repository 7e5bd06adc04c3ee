"""What people look at: tables in the terminal and self-contained HTML reports."""
