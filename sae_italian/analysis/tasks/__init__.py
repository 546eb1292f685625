"""Tasks with a known right answer: the indirect object (`ioi`), agreement (`agreement`), and their scores (`scoring`)."""
