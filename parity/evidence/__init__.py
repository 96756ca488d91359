"""What a side is run for, and what two runs beside each other show."""
