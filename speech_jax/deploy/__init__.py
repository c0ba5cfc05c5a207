"""Trained models out of and into the house: Hugging Face folders, artifacts, streaming, serving."""
