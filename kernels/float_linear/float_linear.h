/* Linear layers, feed-forward blocks, window attention and convolutions in float32 on a CPU, for inference, and feed-forward
   blocks for training.

   A chain of layers is computed for a few rows at a time, so its intermediate results stay in a core's cache, and bias,
   activation, residual and normalization are applied where the products already are. Rows are independent of each
   other, so results depend neither on the number of threads nor on the rest of a batch; only gradients of weights are
   sums over rows, which several threads round differently. */

#ifndef FLOAT_LINEAR_H
#define FLOAT_LINEAR_H

#include <stdint.h>

enum { FLOAT_OK = 0, FLOAT_BAD_ARGUMENT = 1, FLOAT_NO_MEMORY = 2, FLOAT_UNSUPPORTED = 3 };
enum { FLOAT_NONE = 0, FLOAT_RELU = 1, FLOAT_GELU = 2, FLOAT_LEAKY = 3 };

/* A layer packed by float_pack. bias has float_padded_columns(columns) values, or is NULL. */
typedef struct {
    int64_t inputs, columns;
    const float *weight, *bias;
} float_layer;

/* Scale and shift of a normalization over the channels. A NULL scale means that there is no normalization. */
typedef struct {
    const float *scale, *shift;
    float epsilon;
} float_norm;

/* Return the number of floats in a vector that this CPU multiplies at once: 16 with AVX-512, 8 with AVX2 and FMA, or 0
   if it has neither or the library was compiled without them. */
int float_supported(void);

/* Return the size of a packed weight in bytes, and the padded number of columns of its bias. */
int64_t float_packed_bytes(int64_t inputs, int64_t columns);
int64_t float_padded_columns(int64_t columns);

/* Pack a float32 weight (columns, inputs). */
int float_pack(int64_t inputs, int64_t columns, const float *weight, float *packed);

/* out (rows, columns) = activation(layer(x + addend)). addend (addend_rows, inputs) repeats over the rows; NULL adds
   nothing. */
int float_linear(int64_t rows, const float *x, const float *addend, int64_t addend_rows, const float_layer *layer,
                 int32_t activation, int32_t threads, float *out);

/* A residual block of two layers with its normalizations and an optional branch in front:

       x' = x + project(y)                  x' = x if project's weight is NULL
       z  = before(x')
       out = after((post ? z : x') + second(activation(first(z))))

   post selects a post-norm layer, as in the original transformer; without it this is a pre-norm layer, as in Swin. */
int float_feed_forward(int64_t rows, const float *x, const float *y, const float_layer *project,
                       const float_norm *before, const float_layer *first, int32_t activation,
                       const float_layer *second, const float_norm *after, int32_t post, int32_t threads, float *out);

/* The attention half of a Swin layer. In each window w, whose tokens are index[w]:

       q, k, v = qkv(before(x))
       out     = x + project(softmax(q k^T / sqrt(32) + bias [- 100 between regions]) v)

   x and out are (images, tokens, heads * 32). index (windows, area) has each token once and the value `tokens` for
   padding, which is zero after the normalization. regions is (windows, area) or NULL. bias is (heads, area, area). */
int float_window_attention(int64_t images, int64_t tokens, int64_t windows, int64_t area, int64_t heads,
                           const int64_t *index, const int64_t *regions, const float *x, const float_norm *before,
                           const float_layer *qkv, const float *bias, const float_layer *project, int32_t threads,
                           float *out);

/* An image (height, width, channels), channels last: its pixels are `stride` floats apart. */
typedef struct {
    int64_t height, width, channels, stride;
} float_image;

/* A square kernel's side, its step and the zeros around the image, the same in both directions. */
typedef struct {
    int64_t side, step, padding;
} float_kernel;

/* A convolution of `images` images (from) to images (to), with FLOAT_LEAKY multiplying what is below zero by `slope`.

   layer maps the kernel's pixels, row by row, with their channels, to the channels of the output. With `transformed`, for
   kernels of 3 x 3 pixels and step 1, it maps the channels of one pixel, and its weight is 16 packed weights one behind
   the other, see float_winograd.h. The output is computed in blocks of `rows` rows, an even number if transformed, and `columns` of
   its channels, a multiple of the columns that float_padded_columns pads one to. */
typedef struct {
    int64_t images;
    float_image from, to;
    float_layer layer;
    float_kernel kernel;
    int32_t transformed, activation;
    float slope;
    int64_t rows, columns;
} float_convolution;

/* Compute blocks of a convolution until all are taken. `next` is the number of the next block, and threads that share
   the work share it. */
int float_convolve(const float_convolution *c, const float *x, float *out, int64_t *next);

/* Fusion of image and text for some rows f = norm(vision) of image tokens. With M heads of T text tokens, directions
   maps a row to M * T scores, and brought maps M * T weights to a row:

       out    = f + brought(softmax over each head's real text tokens of directions(f))
       peaks  = max_r s_r,   sums = sum_r e^(s_r - peaks),   pooled = sum_r e^(s_r - peaks) f_r,   s = directions(f)

   The sums leave out rows that are not real, where `real` is 0; NULL if all are. peaks and sums are (M * T), pooled is
   (M * T, inputs). text_mask (T) is 1 on real tokens and 0 elsewhere. */
int float_fuse(int64_t rows, int64_t heads, const float *vision, const float_norm *norm,
               const float_layer *directions, const float *text_mask, const float_layer *brought, const uint8_t *real,
               float *out, float *peaks, float *sums, float *pooled);

/* A feed-forward block for training, which skips the hidden values that its ReLU sets to zero:

       out = second(relu(first(x)))

   x and out are (rows, width), first is (hidden, width) and second is (width, hidden), none of them packed. width is a
   multiple of float_supported(), hidden of 64. kept takes the (rows * hidden) hidden values in a layout of its own. */
int float_relu_forward(int64_t rows, int64_t width, int64_t hidden, const float *x, const float *first,
                       const float *first_bias, const float *second, const float *second_bias, int32_t threads,
                       float *kept, float *out);

/* Its gradients, from the gradient of out and from what the forward pass was given and kept. A gradient that is
   not needed is NULL. */
int float_relu_backward(int64_t rows, int64_t width, int64_t hidden, const float *grad, const float *x,
                        const float *kept, const float *first, const float *second, int32_t threads, float *grad_x,
                        float *grad_first, float *grad_first_bias, float *grad_second, float *grad_second_bias);

#endif
