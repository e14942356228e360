"""The whole pipeline on this machine: `run` goes through the stages, on `scenes` of its own, judged by `score`."""
