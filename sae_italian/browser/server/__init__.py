"""The browser on this machine: a small server on loopback, with live work (pip install 'sae-italian[serve]')."""
