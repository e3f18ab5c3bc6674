"""Where networks and their preprocessing come from: libraries, a hub, a folder or a file."""
