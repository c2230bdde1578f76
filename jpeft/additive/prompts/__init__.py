"""Prompts: methods that insert tokens into the text, trained ones or words."""
