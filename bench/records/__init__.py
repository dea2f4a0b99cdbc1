"""What the files of a folder hold, as typed models: read and checked here, written from here, used everywhere."""
