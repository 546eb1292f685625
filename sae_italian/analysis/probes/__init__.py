"""Which latents detect linguistic labels of annotated words (`detect.probe`), and which belong to one language."""
