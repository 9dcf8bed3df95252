"""Whether the first advice on a language model stands when it is asked at length."""
