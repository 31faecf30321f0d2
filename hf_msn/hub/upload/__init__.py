"""The parts of publishing: the listed files, what in them is private, the repository, and its failures in words."""
