"""Super-blocks: columns of a row whose scales are whole multiples of one number."""

#: Columns of a super-block (ggml's QK_K).
SUPER_BLOCK = 256
