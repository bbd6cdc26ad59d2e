"""What the commands share: options, output, files."""
