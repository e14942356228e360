"""What data and judges are worth: numbers over pairs and judgments, length bias, injection, lint."""
