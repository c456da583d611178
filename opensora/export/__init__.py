"""Write a checkpoint as a folder that diffusers opens: `python -m opensora.export CHECKPOINT_DIR OUT`.

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained("OUT", custom_pipeline="OUT", trust_remote_code=True)
    clip = pipeline("a digit 3 moving left", generator=torch.Generator().manual_seed(0)).frames[0]

`folder` builds the folder, `components` writes the weights and configuration of each part, and `source_code` copies the code that runs
them. `files` writes single files.
"""

from opensora.export.folder import export

__all__ = ["export"]
