"""Which latents detect linguistic labels of annotated words (`report.probe`), and which belong to one language."""
