"""The reverse pass in other people's trainers. Each module imports its trainer, and says so where it is missing.

racecar.integrations.lightning      ReversePass, a callback for Lightning
racecar.integrations.transformers   ReverseTrainerMixin, for transformers.Trainer
"""
