/* Convolutions of 3 x 3 pixels with step 1 for one width of vectors; included by float_layers.h.

   Winograd's minimal filtering F(2 x 2, 3 x 3), see Lavin and Gray 2015, arXiv:1509.09308: four output pixels take 16
   multiplications for each pair of channels instead of 36. A tile of 4 x 4 input pixels d and the kernel g give

       Y = A' [ (G g G') * (B' d B) ] A,   where * multiplies element by element and sums over the input channels,

   so the 16 elements are 16 matrix products over tiles and channels. G g G' was computed when the kernel was packed. */

/* B' d B for the pixels of one tile; element k goes to to + k * step. */
INLINE void NAME(tile_in)(const float *const *pixels, int64_t channels, float *to, int64_t step)
{
    for (int64_t c = 0; c < channels; c += LANES) {
        const int64_t left = channels - c;
        vec half[4][4];
        UNROLL for (int j = 0; j < 4; j++)
        {
            const vec a = NAME(load_some)(pixels[j] + c, left), b = NAME(load_some)(pixels[4 + j] + c, left);
            const vec d = NAME(load_some)(pixels[8 + j] + c, left), e = NAME(load_some)(pixels[12 + j] + c, left);
            half[0][j] = a - d, half[1][j] = b + d, half[2][j] = d - b, half[3][j] = b - e;
        }
        UNROLL for (int i = 0; i < 4; i++)
        {
            float *const at = to + 4 * i * step + c;
            NAME(store_some)(at, half[i][0] - half[i][2], left);
            NAME(store_some)(at + step, half[i][1] + half[i][2], left);
            NAME(store_some)(at + 2 * step, half[i][2] - half[i][1], left);
            NAME(store_some)(at + 3 * step, half[i][1] - half[i][3], left);
        }
    }
}

/* A' m A with bias and activation, written to those of the four pixels that are not NULL. */
INLINE void NAME(tile_out)(const float *from, int64_t step, const float *bias, int64_t columns, int32_t activation,
                           float slope, float *const *pixels)
{
    for (int64_t c = 0; c < columns; c += LANES) {
        const int64_t left = columns - c;
        vec half[2][4];
        UNROLL for (int j = 0; j < 4; j++)
        {
            const float *const at = from + j * step + c;
            const vec b = NAME(load_some)(at + 4 * step, left), d = NAME(load_some)(at + 8 * step, left);
            half[0][j] = NAME(load_some)(at, left) + b + d;
            half[1][j] = b - d - NAME(load_some)(at + 12 * step, left);
        }
        const vec shift = bias ? NAME(load_some)(bias + c, left) : (vec){0};
        UNROLL for (int i = 0; i < 2; i++)
        {
            const vec even = half[i][0] + half[i][1] + half[i][2] + shift;
            const vec odd = half[i][1] - half[i][2] - half[i][3] + shift;
            if (pixels[2 * i])
                NAME(store_some)(pixels[2 * i] + c, NAME(activate)(even, activation, slope), left);
            if (pixels[2 * i + 1])
                NAME(store_some)(pixels[2 * i + 1] + c, NAME(activate)(odd, activation, slope), left);
        }
    }
}

/* Tiles that are computed together, so that their elements stay in the cache. */
INLINE int64_t NAME(tiles_at_once)(const float_convolution *c)
{
    const int64_t tiles = TRANSFORMED / (16 * (c->layer.inputs + c->columns)) / TILE * TILE;
    return tiles < 2 * TILE ? 2 * TILE : tiles > BLOCK ? BLOCK : tiles;
}

/* Floats of the buffer of NAME(tiles_of), which begins with zeros for the pixels outside the image. */
INLINE int64_t NAME(tiles_buffer)(const float_convolution *c)
{
    const int64_t tiles = NAME(tiles_at_once)(c);
    return 16 * tiles * (c->layer.inputs + c->columns) + (TILE + 1) * c->layer.inputs;
}

/* Compute rows [first, last) and columns from `column` on of one image; `first` is even. */
TARGET static void NAME(tiles_of)(const float_convolution *c, const float *x, int64_t first, int64_t last,
                                  int64_t column, float *out, float *buffer)
{
    const float_image *const from = &c->from, *const to = &c->to;
    const int64_t inputs = c->layer.inputs, left_over = c->layer.columns - column, across = (to->width + 1) / 2;
    const int64_t columns = left_over < c->columns ? left_over : c->columns;
    const int64_t start = first / 2 * across, end = (last + 1) / 2 * across, block = NAME(tiles_at_once)(c);
    const int64_t packed = inputs * ((c->layer.columns + PANEL - 1) / PANEL * PANEL);
    const float *const weight = c->layer.weight + column * inputs, *const bias = c->layer.bias;
    const float *const zeros = buffer;
    float *const spare = buffer + inputs, *const d = spare + TILE * inputs, *const m = d + 16 * block * inputs;
    for (int64_t at = start; at < end; at += block) {
        const int64_t count = end - at < block ? end - at : block;
        for (int64_t i = 0; i < count; i++) {
            const int64_t top = (at + i) / across * 2 - c->kernel.padding;
            const int64_t left = (at + i) % across * 2 - c->kernel.padding;
            const float *pixels[16];
            for (int64_t p = 0; p < 16; p++) {
                const int64_t row = top + p / 4, place = left + p % 4;
                const int inside = row >= 0 && row < from->height && place >= 0 && place < from->width;
                pixels[p] = inside ? x + (row * from->width + place) * from->stride : zeros;
            }
            NAME(tile_in)(pixels, inputs, d + i * inputs, block * inputs);
        }
        for (int64_t k = 0; k < 16; k++) {
            const float_layer part = {inputs, columns, weight + k * packed, NULL};
            NAME(apply)(&part, count, d + k * block * inputs, FLOAT_NONE, NULL, m + k * block * columns, spare);
        }
        for (int64_t i = 0; i < count; i++) {
            const int64_t top = (at + i) / across * 2, left = (at + i) % across * 2;
            float *pixels[4];
            for (int64_t p = 0; p < 4; p++) {
                const int64_t row = top + p / 2, place = left + p % 2;
                float *const pixel = out + (row * to->width + place) * to->stride + column;
                pixels[p] = row < last && place < to->width ? pixel : NULL;
            }
            NAME(tile_out)(m + i * columns, block * columns, bias ? bias + column : NULL, columns, c->activation, c->slope, pixels);
        }
    }
}
