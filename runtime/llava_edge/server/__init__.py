"""An OpenAI-compatible server and a page for people; needs the extra ``serve``.

A request passes through ``protocol`` (what was asked), ``pictures`` (bytes to pixels, in another process), the
``scheduler`` (one thread that computes for all) and ``replies`` (what is sent back); ``app`` ties them to HTTP.
"""
