"""The geometry of decoder directions, within an SAE and between SAEs (Llama Scope, section 5)."""
