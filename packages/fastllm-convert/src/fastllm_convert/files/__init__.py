"""Readers and writers of file formats. Every file is untrusted: checked before it is used."""
