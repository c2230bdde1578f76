"""Prompts: tokens put into the text, trained or plain."""
