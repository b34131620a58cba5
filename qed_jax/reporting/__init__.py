"""What report.py is made of: files of runs in, one page out."""
