"""Looking into a trained memory: which classes it holds alike, what a picture reads of it."""
