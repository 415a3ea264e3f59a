"""The command `gptoss-opt finetune`: data, options, the loop, and what it writes, over the calls of the library."""
