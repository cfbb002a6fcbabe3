"""The frozen side: the teacher, its pixels, its fast copy, and its cache on disk."""
