"""Fine-tuning of pretrained networks, as commands.

| module | |
|---|---|
| `texts` | decoders, on texts: ``python -m bdia_jax.finetune`` |
| `text_settings` | its settings |
| `text_data` | its texts: packed at once, mixed, or read as the run goes |
| `images` | vision transformers, on images: ``python -m bdia_jax.finetune_images`` |
| `settings` | the settings that both have |
| `run` | the run of both: checks, updates, γ, training; or its plan |
"""
