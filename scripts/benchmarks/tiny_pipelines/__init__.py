"""What pipelines.py needs: tiny random pipelines from diffusers' own tests, and the checks that each goes through."""
