"""The main job: plain training against reverse-pass pretraining on a user's images, with a report."""
