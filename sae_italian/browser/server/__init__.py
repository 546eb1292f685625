"""The browser on this machine: a small server on loopback, with live work (pip install 'sae-italian[serve]').

`app.create_app` makes it, `run.serve` runs it; nothing is imported here, so that what is missing can be said in a line.
"""
