"""Tokenizer files: carried along, and SentencePiece models turned into ``tokenizer.json``."""
