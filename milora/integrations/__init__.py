"""Glue to other libraries; each file imports its library when it is used."""
