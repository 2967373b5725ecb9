/* Linear layers and feed-forward blocks with 8-bit products on a CPU, for inference.

   Each row x of the input and each column w of the weight is scaled by its own largest value to integers in
   [-127, 127], and their products are summed exactly in 32 bits:

       y = s_x s_w (q_x . q_w) + b,   s_x = max|x| / 127,   q_x = round(x / s_x)

   Normalization, bias, activation and residual are float32. Rows are independent of each other, so results depend
   neither on the number of threads nor on the rest of a batch. */

#ifndef INT8_LINEAR_H
#define INT8_LINEAR_H

#include <stdint.h>

enum { INT8_OK = 0, INT8_BAD_ARGUMENT = 1, INT8_NO_MEMORY = 2, INT8_UNSUPPORTED = 3 };
enum { INT8_NONE = 0, INT8_RELU = 1, INT8_GELU = 2 };

/* A layer packed by int8_pack; bias (columns) may be NULL. */
typedef struct {
    int64_t inputs, columns;
    const int8_t *weight;
    const float *scale, *bias;
    const int32_t *offset;
} int8_layer;

/* Scale and shift of a normalization over the channels. A NULL scale means that there is no normalization. */
typedef struct {
    const float *scale, *shift;
    float epsilon;
} int8_norm;

/* Return 1 if this CPU has AVX-512 VNNI and the library was compiled with it, else 0. */
int int8_supported(void);

/* Return the size of a packed weight in bytes, and the padded number of columns of its scales and offsets. */
int64_t int8_packed_bytes(int64_t inputs, int64_t columns);
int64_t int8_padded_columns(int64_t columns);

/* Quantize a float32 weight (columns, inputs) into its packed form, scales and offsets. */
int int8_pack(int64_t inputs, int64_t columns, const float *weight, int8_t *packed, float *scale, int32_t *offset);

/* out (rows, columns) = activation(layer(x + addend)). addend (addend_rows, inputs) repeats over the rows; NULL adds
   nothing. */
int int8_linear(int64_t rows, const float *x, const float *addend, int64_t addend_rows,
                const int8_layer *layer, int32_t activation, int32_t threads, float *out);

/* A residual block of two layers with its normalizations and an optional branch in front:

       x' = x + project(y)                  x' = x if project's weight is NULL
       z  = before(x')
       out = after((post ? z : x') + second(activation(first(z))))

   post selects a post-norm layer, as in the original transformer; without it this is a pre-norm layer, as in Swin. */
int int8_feed_forward(int64_t rows, const float *x, const float *y, const int8_layer *project, const int8_norm *before,
                      const int8_layer *first, int32_t activation, const int8_layer *second, const int8_norm *after,
                      int32_t post, int32_t threads, float *out);

/* The attention half of a Swin layer. In each window w, whose tokens are index[w]:

       q, k, v = qkv(before(x))
       out     = x + project(softmax(q k^T / sqrt(32) + bias [- 100 between regions]) v)

   x and out are (images, tokens, heads * 32). index (windows, area) has each token once and the value `tokens` for
   padding, which is zero after the normalization. regions is (windows, area) or NULL. bias is (heads, area, area). */
int int8_window_attention(int64_t images, int64_t tokens, int64_t windows, int64_t area, int64_t heads,
                          const int64_t *index, const int64_t *regions, const float *x, const int8_norm *before,
                          const int8_layer *qkv, const float *bias, const int8_layer *project, int32_t threads,
                          float *out);

#endif
