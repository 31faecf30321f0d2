"""Trainers: a pair of files a method, arguments and trainer, over what they share."""
