/* Decoder of weightvid's HEVC tracks. Numbers of sections and tables are those of ITU-T H.265.

   In a picture of the device profile (FORMAT.md, section 8) every block is predicted from its
   neighbours inside the picture, and the difference is coded as it is. So samples are final once
   their block is done: the frame is decoded right where the caller wants it, and nothing else as
   large exists. Chroma is constant, which all prediction gets right: differences are refused. */
#include "hevc.h"

#include <string.h>

enum {
    SIDE_STEP = 64, MIN_SIDE = 192, MAX_SIDE = 2176, MAX_SAMPLES = 2228224, MAX_CTB = 64,
    UNIT = 4, /* side of the smallest block; what is remembered about neighbours is per unit */
    PLANAR = 0, DC = 1, HORIZONTAL = 10, VERTICAL = 26, MODE_BITS = 6, MODE_MASK = 63,
    MAX_PREFIX = 11 /* longer ones code differences over 255, which 8-bit samples do not have */
};

/* Contexts, each the index of a state of probability times two plus the likelier value. */
enum {
    SPLIT_CU = 0, LOSSLESS_CU = 3, WHOLE_CU = 4, LIKELY_MODE = 5, CHROMA_MODE = 6,
    SPLIT_TRANSFORM = 7, CBF_LUMA = 10, CBF_CHROMA = 12, LAST_X = 13, LAST_Y = 28,
    CODED_SUB_BLOCK = 43, SIGNIFICANT = 45, GREATER_1 = 72, GREATER_2 = 88, END_OF_SLICE = 92
};

/* A square block: place of its corner, and its side as a binary logarithm. `there`: which of the
   two blocks of that size that touch it at other corners, above right and below left, were decoded
   before it. As sizes and places are powers of two, they were as a whole or not at all. */
enum { ABOVE_RIGHT = 1, BELOW_LEFT = 2 };
typedef struct { unsigned x, y, log2, there; } block;

/* A NAL unit that is read. The lowest `spare` bits of `value` were read ahead; above them is the
   offset of arithmetic decoding. Zeros behind the end may be read ahead, but not used. */
typedef struct {
    const uint8_t *data;
    size_t at, stop, end; /* offsets; stop: of a byte to leave out (7.4.2); at may pass the end */
    uint32_t value, range;
    unsigned spare;
} reader;

struct wv_hevc {
    reader in;
    int refused; /* damaged, or outside the profile */
    /* of the parameter sets; sides of blocks as binary logarithms */
    uint32_t width, height;
    unsigned ctb, min_cb, max_tb, min_tb, max_depth, strong_smoothing, sps_id, pps_id;
    int qp;
    /* of the picture at hand */
    uint8_t *luma, contexts[END_OF_SLICE + 1];
    size_t stride, places[16]; /* distances of samples in blocks of 4 x 4 from the first one */
    /* Of the last block in every column of the picture and in every row of the coding tree block:
       mode, and above it depth in the coding quadtree. Blocks come in an order in which the last
       one of a column is the one right above the current one. */
    uint8_t above[MAX_SIDE / UNIT], left[MAX_CTB / UNIT];
    /* of the coding unit at hand: modes of its quarters, or of all of it */
    unsigned modes[4], mode, quartered, log2;
};

/* The next byte that prevents emulation of start codes: a 3 behind two zeros (7.4.2), if any. */
static size_t find_stop(const uint8_t *data, size_t from, size_t end) {
    for (size_t i = from + 2; i < end; i += data[i] > 3 ? 3 : 1)
        if (data[i] == 3 && !(data[i - 1] | data[i - 2]))
            return i;
    return SIZE_MAX;
}

static void open_unit(wv_hevc *hevc, const uint8_t *data, size_t size) {
    hevc->in = (reader){.data = data, .stop = find_stop(data, 0, size), .end = size};
}

/* Reads ahead until 16 to 23 bits are spare. */
static inline void refill(reader *in) {
    for (; in->spare < 16; in->spare += 8, in->at++) {
        if (in->at == in->stop)
            in->stop = find_stop(in->data, ++in->at, in->end);
        in->value = in->value << 8 | (in->at < in->end ? in->data[in->at] : 0u);
    }
}

static unsigned read_bits(wv_hevc *hevc, unsigned count) {
    reader *const in = &hevc->in;
    refill(in);
    in->spare -= count;
    return in->value >> in->spare & ((1u << count) - 1);
}

/* ue(v) of 9.2; no number that matters has more than 17 bits */
static unsigned read_ue(wv_hevc *hevc) {
    unsigned zeros = 0;
    while (zeros < 16 && !read_bits(hevc, 1))
        zeros++;
    return (1u << zeros) - 1 + read_bits(hevc, zeros);
}

static int read_se(wv_hevc *hevc) {
    const int code = (int)read_ue(hevc);
    return code & 1 ? code / 2 + 1 : -(code / 2);
}

static void expect(wv_hevc *hevc, unsigned value, unsigned wanted) {
    hevc->refused |= value != wanted;
}

/* --- arithmetic decoder (9.3.4.3) ------------------------------------------------------------- */

/* Initial values in I slices (tables 9-5 to 9-37); the last context never leaves its state. */
static const uint8_t context_init[END_OF_SLICE] = {
    139, 141, 157, 154, 184, 184, 63, 153, 138, 138, 111, 141, 94, 110, 110, 124, 125, 140, 153,
    125, 127, 140, 109, 111, 143, 127, 111, 79, 110, 110, 124, 125, 140, 153, 125, 127, 140, 109,
    111, 143, 127, 111, 79, 91, 171, 111, 111, 125, 110, 110, 94, 124, 108, 124, 107, 125, 141, 179,
    153, 125, 107, 125, 141, 179, 153, 125, 107, 125, 141, 179, 153, 125, 140, 92, 137, 138, 140,
    152, 138, 139, 153, 74, 149, 92, 139, 107, 122, 152, 138, 153, 136, 167
};

/* Table 9-46: the range of the less likely value; by state, and by two bits of the range. */
static const uint8_t less_likely_range[64 * 4] = {
    128, 176, 208, 240, 128, 167, 197, 227, 128, 158, 187, 216, 123, 150, 178, 205, 116, 142, 169,
    195, 111, 135, 160, 185, 105, 128, 152, 175, 100, 122, 144, 166, 95, 116, 137, 158, 90, 110,
    130, 150, 85, 104, 123, 142, 81, 99, 117, 135, 77, 94, 111, 128, 73, 89, 105, 122, 69, 85, 100,
    116, 66, 80, 95, 110, 62, 76, 90, 104, 59, 72, 86, 99, 56, 69, 81, 94, 53, 65, 77, 89, 51, 62,
    73, 85, 48, 59, 69, 80, 46, 56, 66, 76, 43, 53, 63, 72, 41, 50, 59, 69, 39, 48, 56, 65, 37, 45,
    54, 62, 35, 43, 51, 59, 33, 41, 48, 56, 32, 39, 46, 53, 30, 37, 43, 50, 29, 35, 41, 48, 27, 33,
    39, 45, 26, 31, 37, 43, 24, 30, 35, 41, 23, 28, 33, 39, 22, 27, 32, 37, 21, 26, 30, 35, 20, 24,
    29, 33, 19, 23, 27, 31, 18, 22, 26, 30, 17, 21, 25, 28, 16, 20, 23, 27, 15, 19, 22, 25, 14, 18,
    21, 24, 14, 17, 20, 23, 13, 16, 19, 22, 12, 15, 18, 21, 12, 14, 17, 20, 11, 14, 16, 19, 11, 13,
    15, 18, 10, 12, 15, 17, 10, 12, 14, 16, 9, 11, 13, 15, 9, 11, 12, 14, 8, 10, 12, 14, 8, 9, 11,
    13, 7, 9, 11, 12, 7, 9, 10, 12, 7, 8, 10, 11, 6, 8, 9, 11, 6, 7, 9, 10, 6, 7, 8, 9, 2, 2, 2, 2
};

/* Table 9-47: the bits of the context that the less likely value flips; by state. */
static const uint8_t less_likely_flips[64] = {
    1, 2, 6, 2, 12, 2, 4, 4, 28, 28, 4, 4, 10, 12, 10, 6, 58, 56, 58, 56, 8, 10, 8, 10, 22, 20, 30,
    28, 20, 22, 18, 14, 112, 112, 112, 114, 126, 124, 116, 116, 106, 110, 104, 106, 102, 26, 28, 28,
    34, 32, 32, 34, 46, 44, 42, 38, 56, 58, 62, 60, 50, 54, 48, 0
};

static inline unsigned next_bin(reader *in, uint8_t *context) {
    const unsigned state = *context, likely = state & 1;
    const uint32_t less = less_likely_range[(size_t)(state & 126) * 2 + (in->range >> 6) - 4];
    if (in->spare < 8) /* no bin takes more than 7 */
        refill(in);
    in->range -= less;
    if (in->value < in->range << in->spare) {
        *context = (uint8_t)(state < 124 ? state + 2 : state);
        const unsigned small = in->range < 256; /* no branch: it would not be foreseen */
        in->range <<= small;
        in->spare -= small;
        return likely;
    }
    in->value -= in->range << in->spare;
    *context = (uint8_t)(state ^ less_likely_flips[state >> 1]);
    for (in->range = less; in->range < 256; in->range <<= 1)
        in->spare--;
    return likely ^ 1;
}

static unsigned decode_bin(wv_hevc *hevc, unsigned context) {
    return next_bin(&hevc->in, hevc->contexts + context);
}

/* The next 16 bins if all of them were bypass bins: bins of even chances are the digits of a
   quotient. take_bypass() takes the first `count` of them. */
static inline uint32_t peek_bypass(reader *in) {
    refill(in);
    return (in->value >> (in->spare - 16)) / in->range;
}

static inline uint32_t take_bypass(reader *in, uint32_t peeked, unsigned count) {
    const uint32_t bins = peeked >> (16 - count);
    in->spare -= count;
    in->value -= bins * in->range << in->spare;
    return bins;
}

static uint32_t decode_bypass(wv_hevc *hevc, unsigned count) {
    return take_bypass(&hevc->in, peek_bypass(&hevc->in), count);
}

/* --- parameter sets and slice header (7.3.2, 7.3.6) ------------------------------------------- */

static void read_sps(wv_hevc *hevc) {
    expect(hevc, read_bits(hevc, 16) & 0xE1F, 1); /* a temporal layer; Main, without extensions */
    for (unsigned i = 0; i < 11; i++)
        read_bits(hevc, 8); /* compatibility, constraints, level */
    hevc->sps_id = read_ue(hevc);
    expect(hevc, read_ue(hevc), 1); /* 4:2:0 */
    expect(hevc, read_ue(hevc), hevc->width);
    expect(hevc, read_ue(hevc), hevc->height);
    expect(hevc, read_bits(hevc, 3), 3); /* window; bit depths over 8: two ue(v) */
    read_ue(hevc);
    read_bits(hevc, 1);
    for (unsigned i = 0; i < 3; i++)
        read_ue(hevc);
    hevc->min_cb = read_ue(hevc) + 3;
    hevc->ctb = read_ue(hevc) + hevc->min_cb;
    hevc->min_tb = read_ue(hevc) + 2;
    hevc->max_tb = read_ue(hevc) + hevc->min_tb;
    read_ue(hevc);
    hevc->max_depth = read_ue(hevc);
    hevc->refused |= hevc->ctb < 4 || hevc->ctb > 6 || hevc->max_tb > 5 ||
                     hevc->min_tb >= hevc->min_cb;
    expect(hevc, read_bits(hevc, 4), 0); /* scaling lists, AMP, SAO, PCM */
    expect(hevc, read_bits(hevc, 2), 2); /* reference pictures: ue(v) for short-term, long-term */
    hevc->strong_smoothing = read_bits(hevc, 2) & 1; /* the rest does not matter to decoding */
}

static void read_pps(wv_hevc *hevc) {
    hevc->pps_id = read_ue(hevc);
    expect(hevc, read_ue(hevc), hevc->sps_id);
    expect(hevc, read_bits(hevc, 7) >> 1, 0); /* dependent slices, their fields, sign hiding */
    read_ue(hevc);
    read_ue(hevc);
    hevc->qp = read_se(hevc) + 26;
    expect(hevc, read_bits(hevc, 3) & 3, 0); /* transform skip, QP delta */
    read_ue(hevc);
    read_ue(hevc);
    expect(hevc, read_bits(hevc, 6) & 0x27, 4); /* fields of slices; lossless; tiles, wavefronts */
    expect(hevc, read_bits(hevc, 6) & 30, 20); /* deblocking: off, in all slices; scaling lists */
    read_ue(hevc);
    expect(hevc, read_bits(hevc, 1), 0); /* fields of slices */
}

static void read_slice_header(wv_hevc *hevc) {
    expect(hevc, (read_bits(hevc, 7) - 19) >> 1, 0); /* IDR, of two types */
    expect(hevc, read_bits(hevc, 11) >> 1, 3); /* of the base layer; first slice of the picture */
    expect(hevc, read_ue(hevc), hevc->pps_id);
    expect(hevc, read_ue(hevc), 2); /* I */
    int qp = hevc->qp + read_se(hevc);
    expect(hevc, read_bits(hevc, 1), 1);
    expect(hevc, read_bits(hevc, hevc->in.spare % 8), 0);
    qp = qp < 0 ? 0 : qp > 51 ? 51 : qp; /* from here on the start of the arithmetic code: 9.3.2 */
    for (unsigned i = 0; i < END_OF_SLICE; i++) {
        const int slope = (context_init[i] >> 4) * 5 - 45, offset = (context_init[i] & 15) * 8 - 16;
        const int all = (slope * qp + 4096) / 16 - 256 + offset; /* rounded down */
        const int state = all < 1 ? 1 : all > 126 ? 126 : all;
        hevc->contexts[i] = (uint8_t)(state < 64 ? (63 - state) << 1 : (state - 64) << 1 | 1);
    }
    hevc->contexts[END_OF_SLICE] = 126;
    expect(hevc, read_bits(hevc, 9) > 509, 0); /* the offset, which stays above the spare bits */
    hevc->in.value &= (1u << (hevc->in.spare + 9)) - 1;
    hevc->in.range = 510;
}

size_t wv_hevc_memory(uint32_t width, uint32_t height) {
    const int allowed = width >= MIN_SIDE && width <= MAX_SIDE && width % SIDE_STEP == 0 &&
                        height >= MIN_SIDE && height <= MAX_SIDE && height % SIDE_STEP == 0;
    return allowed && width * height <= MAX_SAMPLES ? sizeof(wv_hevc) : 0;
}

/* The record is that of ISO/IEC 14496-15, 8.3.3, with one VPS, SPS and PPS. */
wv_hevc *wv_hevc_open(const uint8_t *config, size_t config_size, uint32_t width, uint32_t height,
                      void *memory, size_t memory_size) {
    wv_hevc *const hevc = memory;
    size_t at = 23, size;
    if (!wv_hevc_memory(width, height) || memory_size < sizeof *hevc || config_size < at ||
        config[0] != 1 || (config[21] & 3) != 3 || config[22] != 3) /* lengths of 4 bytes; arrays */
        return NULL;
    *hevc = (wv_hevc){.width = width, .height = height};
    for (unsigned type = 32; type < 35; type++, at += 5 + size) {
        if (config_size - at < 5 || config[at + 1] || config[at + 2] != 1)
            return NULL;
        size = (size_t)(config[at + 3] << 8 | config[at + 4]);
        if (config_size - at - 5 < size)
            return NULL;
        open_unit(hevc, config + at + 5, size);
        expect(hevc, read_bits(hevc, 16) >> 9, type);
        if (type == 33)
            read_sps(hevc);
        if (type == 34)
            read_pps(hevc);
        hevc->refused |= hevc->in.at > hevc->in.end + hevc->in.spare / 8;
    }
    return hevc->refused ? NULL : hevc;
}

/* --- intra prediction (8.4.4.2) --------------------------------------------------------------- */

static uint8_t clip(int sample) {
    return (uint8_t)(!(sample & ~255) ? sample : sample < 0 ? 0 : 255);
}

/* A border is the row of samples around a block, from the lowest on the left, corner[-2 n], to the
   rightmost above, corner[2 n] (8.4.4.2.3). */
static void smooth_border(uint8_t *corner, int n, int strong_allowed) {
    const int first = corner[-2 * n], middle = *corner, last = corner[2 * n];
    const int bend = first + middle - 2 * corner[-n], bend_above = middle + last - 2 * corner[n];
    if (strong_allowed && n == 32 && bend > -8 && bend < 8 && bend_above > -8 && bend_above < 8) {
        for (int i = 1; i < 64; i++) {
            corner[-i] = (uint8_t)(((64 - i) * middle + i * first + 32) >> 6);
            corner[i] = (uint8_t)(((64 - i) * middle + i * last + 32) >> 6);
        }
    } else {
        for (int i = 1 - 2 * n, previous = first, here; i < 2 * n; i++, previous = here) {
            here = corner[i];
            corner[i] = (uint8_t)((previous + 2 * here + corner[i + 1] + 2) >> 2);
        }
    }
}

static void predict_planar(uint8_t *luma, size_t stride, int n, const uint8_t *corner) {
    const int right = corner[n + 1], below = corner[-n - 1];
    for (int y = 0; y < n; y++, luma += stride)
        for (int x = 0; x < n; x++)
            luma[x] = (uint8_t)(((n - 1 - x) * corner[-y - 1] + (x + 1) * right +
                                 (n - 1 - y) * corner[x + 1] + (y + 1) * below + n) / (2 * n));
}

static void predict_dc(uint8_t *luma, size_t stride, int n, const uint8_t *corner) {
    int mean = n;
    for (int i = 1; i <= n; i++)
        mean += corner[i] + corner[-i];
    mean /= 2 * n;
    for (int y = 0; y < n; y++)
        memset(luma + (size_t)y * stride, mean, (size_t)n);
    for (int i = 1; i < n && n < 32; i++) {
        luma[i] = (uint8_t)((corner[i + 1] + 3 * mean + 2) >> 2);
        luma[(size_t)i * stride] = (uint8_t)((corner[-i - 1] + 3 * mean + 2) >> 2);
    }
    if (n < 32)
        *luma = (uint8_t)((corner[-1] + 2 * mean + corner[1] + 2) >> 2);
}

/* 8.4.4.2.6. Modes below 18 are like the others with rows and columns exchanged. */
static void predict_angular(uint8_t *luma, size_t stride, int n, int mode, const uint8_t *corner) {
    static const uint8_t angles[9] = {0, 2, 5, 9, 13, 17, 21, 26, 32};
    const int side = mode < 18 ? -1 : 1, turn = mode < 18 ? HORIZONTAL - mode : mode - VERTICAL;
    const int angle = turn < 0 ? -angles[-turn] : angles[turn];
    const size_t along = mode < 18 ? stride : 1, across = mode < 18 ? 1 : stride;
    uint8_t samples[32 + 64 + 2], *const line = samples + 32; /* line[0] is the corner */
    for (int i = 0; i <= 2 * n; i++)
        line[i] = corner[i * side];
    line[2 * n + 1] = 0; /* read, but multiplied by 0 */
    for (int i = 1; i <= n * -angle / 32; i++)
        line[-i] = corner[-side * ((i * ((8192 - angle / 2) / -angle) + 128) >> 8)];
    for (int y = 0; y < n; y++) {
        const int place = (y + 1) * angle + 32 * 32, part = place % 32; /* not negative */
        const uint8_t *const from = line + place / 32 - 32 + 1;
        uint8_t *to = luma + (size_t)y * across;
        for (int x = 0; x < n; x++, to += along)
            *to = (uint8_t)(((32 - part) * from[x] + part * from[x + 1] + 16) >> 5);
    }
    for (int y = 0; y < n && n < 32 && !angle; y++)
        luma[(size_t)y * across] = clip(line[1] + ((corner[-side * (y + 1)] - *corner) >> 1));
}

static void predict(const wv_hevc *hevc, block at, uint8_t *luma) {
    static const uint8_t smooth_from[6] = {0, 0, 35, 8, 2, 1}; /* turn, by log2 */
    const int n = 1 << at.log2, mode = (int)hevc->mode;
    const int turn = mode < 18 ? mode - HORIZONTAL : mode - VERTICAL;
    const int lefts = !at.x ? 0 : at.there & BELOW_LEFT ? 2 * n : n;
    const int aboves = !at.y ? 0 : at.there & ABOVE_RIGHT ? 2 * n : n;
    uint8_t border[4 * 32 + 1], *const corner = border + 2 * 32;
    for (int i = 0; i < lefts; i++)
        corner[-1 - i] = (luma + (size_t)i * hevc->stride)[-1];
    if (aboves)
        memcpy(corner + 1, luma - hevc->stride, (size_t)aboves);
    *corner = lefts && aboves ? *(luma - hevc->stride - 1)
              : lefts ? corner[-1] : aboves ? corner[1] : 128;
    memset(corner - 2 * n, corner[-lefts], (size_t)(2 * n - lefts)); /* missing: like the next */
    memset(corner + aboves + 1, corner[aboves], (size_t)(2 * n - aboves));
    if (mode != DC && (turn < 0 ? -turn : turn) >= smooth_from[at.log2])
        smooth_border(corner, n, hevc->strong_smoothing != 0);
    if (mode == PLANAR)
        predict_planar(luma, hevc->stride, n, corner);
    else if (mode == DC)
        predict_dc(luma, hevc->stride, n, corner);
    else
        predict_angular(luma, hevc->stride, n, mode, corner);
}

/* --- differences (7.3.8.11, 9.3.4.2.4 to 9.3.4.2.7) ------------------------------------------- */

/* Places 4 y + x of coefficients in a sub-block of 4 x 4, by order. */
enum { UP_RIGHT, ACROSS, DOWN };
static const uint8_t scan_order[][16] = {
    {0, 4, 1, 8, 5, 2, 12, 9, 6, 3, 13, 10, 7, 14, 11, 15},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15}
};

/* Context of a significance flag by place: for sub-blocks whose neighbours right (1) and below (2)
   are coded or not, and for blocks of 4 x 4. */
static const uint8_t place_context[5][16] = {
    {2, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0},
    {2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0},
    {2, 1, 0, 0, 2, 1, 0, 0, 2, 1, 0, 0, 2, 1, 0, 0},
    {2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2},
    {0, 1, 4, 5, 2, 3, 4, 5, 6, 6, 8, 8, 7, 7, 8, 8}
};

/* coeff_abs_level_remaining */
static inline unsigned decode_remaining(wv_hevc *hevc, reader *in, unsigned rice) {
    const uint32_t peeked = peek_bypass(in);
    unsigned prefix = 0;
    for (uint32_t bit = 1u << 15; peeked & bit; bit >>= 1)
        prefix++;
    if (prefix > MAX_PREFIX) {
        hevc->refused = 1;
        return 0;
    }
    const unsigned base = prefix < 4 ? prefix : (1u << (prefix - 3)) + 2;
    const unsigned count = prefix < 4 ? rice : prefix - 3 + rice, all = prefix + 1 + count;
    if (all <= 16) /* nearly always */
        return (base << rice) + (take_bypass(in, peeked, all) & ((1u << count) - 1));
    take_bypass(in, peeked, prefix + 1);
    return (base << rice) + take_bypass(in, peek_bypass(in), count);
}

/* Adds the coefficients at `count` places of a sub-block to the samples there. `set` is the set of
   contexts for flags of greater ones. Returns whether there was a flag set. */
static inline unsigned decode_levels(wv_hevc *hevc, reader *in, const uint8_t *places,
                                     unsigned count, unsigned set, uint8_t *luma) {
    const unsigned flags = count < 8 ? count : 8;
    unsigned greater = 0, rice = 0;
    for (unsigned i = 0; i < flags; i++) {
        const unsigned context = greater ? 0 : i < 2 ? i + 1 : 3;
        greater |= next_bin(in, hevc->contexts + GREATER_1 + 4 * set + context) << i;
    }
    const unsigned first = greater & (0 - greater);
    const unsigned second = first && next_bin(in, hevc->contexts + GREATER_2 + set) ? first : 0;
    const unsigned open = (greater ^ first) | second | ~0u << flags; /* may be greater still */
    uint32_t signs = take_bypass(in, peek_bypass(in), count) << (32 - count);
    for (unsigned i = 0; i < count; i++, signs <<= 1) {
        uint8_t *const sample = luma + hevc->places[places[i]];
        int level = (int)(1 + (greater >> i & 1) + (second >> i & 1));
        if (open >> i & 1) {
            level += (int)decode_remaining(hevc, in, rice);
            rice += rice < 4 && level > 3 << rice; /* larger ones need another parameter */
        }
        *sample = clip(*sample + (signs >> 31 ? -level : level));
    }
    return greater != 0;
}

/* The differences of a transform block, which are added to the prediction. */
static void decode_residual(wv_hevc *hevc, unsigned log2, uint8_t *luma) {
    const unsigned mode = hevc->mode, end = (1u << (log2 - 2)) - 1; /* last row of sub-blocks */
    const unsigned scan = log2 > 3 ? UP_RIGHT : mode >= 6 && mode <= 14 ? DOWN
                          : mode >= 22 && mode <= 30 ? ACROSS : UP_RIGHT;
    const unsigned by_size = log2 == 2 ? 0 : log2 > 3 ? 21 : scan == UP_RIGHT ? 9 : 15;
    const uint8_t *const order = scan_order[scan];
    uint8_t coded[9] = {0}; /* sub-blocks with coefficients: a bit each, a byte a row */
    const unsigned first = 3 * (log2 - 2) + (log2 - 1) / 4, shift = (log2 + 1) / 4;
    /* place of the last coefficient: x, y, or the other way round where rows are columns */
    unsigned last[2] = {0}, index = 16, is_last = 1, greater = 0;
    for (unsigned i = 0; i < 2; i++)
        while (last[i] < 2 * log2 - 1 &&
               decode_bin(hevc, (i ? LAST_Y : LAST_X) + first + (last[i] >> shift)))
            last[i]++;
    for (unsigned i = 0; i < 2; i++)
        if (last[i] > 3) {
            const unsigned count = last[i] / 2 - 1;
            last[i] = (2 + last[i] % 2) << count | decode_bypass(hevc, count);
        }
    reader in = hevc->in; /* here, where samples that are written cannot be it */
    unsigned x = last[scan == DOWN], y = last[scan != DOWN];
    while (order[--index] != y % 4 * 4 + x % 4)
        ;
    for (x /= 4, y /= 4;; is_last = 0, index = 16) { /* from here on those of the sub-block */
        const unsigned right = (unsigned)coded[y] >> (x + 1) & 1, is_first = !(x | y);
        const unsigned pattern = ((unsigned)coded[y + 1] >> x & 1) * 2 + right;
        if (is_last || is_first || next_bin(&in, hevc->contexts + CODED_SUB_BLOCK + !!pattern)) {
            const uint8_t *const by_place = place_context[log2 == 2 ? 4 : pattern];
            uint8_t *const contexts = hevc->contexts + SIGNIFICANT + by_size + (is_first ? 0 : 3);
            uint8_t places[16];
            unsigned count = 0;
            coded[y] |= (uint8_t)(1u << x);
            if (is_last)
                places[count++] = order[index];
            while (index > 1) {
                places[count] = order[--index];
                count += next_bin(&in, contexts + by_place[places[count]]);
            }
            /* That at place 0 goes without saying where a coded sub-block has no other one. */
            if (index && ((!count && !is_first) ||
                          next_bin(&in, is_first ? hevc->contexts + SIGNIFICANT
                                                 : contexts + by_place[0])))
                places[count++] = 0;
            if (count)
                greater = decode_levels(hevc, &in, places, count, (is_first ? 0u : 2u) + greater,
                                        luma + (y * hevc->stride + x) * 4);
        }
        if (is_first)
            break;
        if (scan == ACROSS) { /* to the sub-block before this one */
            y -= !x;
            x = !x;
        } else {
            const unsigned inside = x && y < end, diagonal = x + y - !inside;
            x = inside ? x - 1 : diagonal < end ? diagonal : end;
            y = diagonal - x;
        }
    }
    hevc->in = in;
}

/* --- coding tree (7.3.8.4 to 7.3.8.10) -------------------------------------------------------- */

static block quarter(block whole, unsigned i) {
    const unsigned half = 1u << (whole.log2 - 1);
    const unsigned first = (whole.y ? ABOVE_RIGHT : 0u) | (whole.x ? BELOW_LEFT : 0u);
    const unsigned there[4] = {first, whole.there & ABOVE_RIGHT, whole.there | ABOVE_RIGHT, 0};
    return (block){whole.x + i % 2 * half, whole.y + i / 2 * half, whole.log2 - 1, there[i]};
}

static void decode_transforms(wv_hevc *hevc, block at) {
    const unsigned depth = hevc->log2 - at.log2, quartered = !depth && hevc->quartered;
    unsigned split = quartered || at.log2 > hevc->max_tb;
    if (!split && at.log2 > hevc->min_tb && depth < hevc->max_depth + hevc->quartered)
        split = decode_bin(hevc, SPLIT_TRANSFORM + 5 - at.log2);
    if (!depth) /* once for all: no difference in Cb, none in Cr */
        hevc->refused |= decode_bin(hevc, CBF_CHROMA) || decode_bin(hevc, CBF_CHROMA);
    for (unsigned i = 0; i < 4 && split && !hevc->refused; i++) {
        hevc->mode = quartered ? hevc->modes[i] : hevc->mode;
        decode_transforms(hevc, quarter(at, i));
    }
    if (!split) {
        uint8_t *const luma = hevc->luma + at.y * hevc->stride + at.x;
        predict(hevc, at, luma);
        if (decode_bin(hevc, CBF_LUMA + !depth))
            decode_residual(hevc, at.log2, luma);
    }
}

/* 8.4.2: from those left and above, `a` and `b`, and mpm_idx or 3 + rem_intra_luma_pred_mode. */
static unsigned luma_mode(unsigned a, unsigned b, unsigned choice) {
    unsigned third = a && b ? PLANAR : a != DC && b != DC ? DC : VERTICAL, mode = choice - 3;
    if (a == b) { /* and the directions next to it */
        third = a > DC ? 2 + (a - 1) % 32 : VERTICAL;
        b = a > DC ? 2 + (a + 29) % 32 : DC;
        a = a > DC ? a : PLANAR;
    }
    if (choice < 3)
        return choice == 0 ? a : choice == 1 ? b : third;
    /* The others are numbered in order: it is as much higher as there are likely ones below it. */
    for (unsigned i = 0; i < 3; i++)
        mode = choice - 3 + (a <= mode) + (b <= mode) + (third <= mode);
    return mode;
}

static void decode_coding_unit(wv_hevc *hevc, block at, uint8_t *above, uint8_t *left) {
    const unsigned depth = hevc->ctb - at.log2;
    unsigned likely[4];
    hevc->refused |= !decode_bin(hevc, LOSSLESS_CU);
    hevc->quartered = at.log2 == hevc->min_cb && !decode_bin(hevc, WHOLE_CU);
    hevc->log2 = at.log2;
    const unsigned parts = hevc->quartered ? 4 : 1, size = (1u << at.log2 >> parts / 4) / UNIT;
    for (unsigned i = 0; i < parts; i++)
        likely[i] = decode_bin(hevc, LIKELY_MODE);
    for (unsigned i = 0; i < parts; i++) {
        uint8_t *const a = left + i / 2 * size, *const b = above + i % 2 * size;
        /* Modes across a row of coding trees don't count, lest decoders have to keep them. */
        const unsigned mode_above = a > hevc->left ? *b & MODE_MASK : DC;
        const unsigned choice = !likely[i] ? 3 + decode_bypass(hevc, 5)
                                : decode_bypass(hevc, 1) ? 1 + decode_bypass(hevc, 1) : 0;
        hevc->modes[i] = luma_mode(*a & MODE_MASK, mode_above, choice);
        memset(a, (int)(hevc->modes[i] | depth << MODE_BITS), size);
        memset(b, (int)(hevc->modes[i] | depth << MODE_BITS), size);
    }
    decode_bypass(hevc, 2 * decode_bin(hevc, CHROMA_MODE));
    hevc->mode = hevc->modes[0];
    decode_transforms(hevc, at);
}

static void decode_quadtree(wv_hevc *hevc, block at) {
    const unsigned row = at.y & ((1u << hevc->ctb) - 1);
    uint8_t *const above = hevc->above + at.x / UNIT, *const left = hevc->left + row / UNIT;
    const int depth = (int)(hevc->ctb - at.log2);
    const int deeper = (*above >> MODE_BITS > depth) + (*left >> MODE_BITS > depth);
    if (at.log2 == hevc->min_cb || !decode_bin(hevc, SPLIT_CU + (unsigned)deeper))
        decode_coding_unit(hevc, at, above, left);
    else
        for (unsigned i = 0; i < 4 && !hevc->refused; i++)
            decode_quadtree(hevc, quarter(at, i));
}

int wv_hevc_decode(wv_hevc *hevc, const uint8_t *packet, size_t size, uint8_t *luma,
                   size_t stride) {
    const unsigned side = 1u << hevc->ctb;
    if (size < 4 || ((uint32_t)packet[0] << 24 | (uint32_t)packet[1] << 16 |
                     (uint32_t)packet[2] << 8 | packet[3]) != size - 4)
        return -1; /* one slice, so one unit, is a picture */
    open_unit(hevc, packet + 4, size - 4);
    hevc->refused = 0;
    read_slice_header(hevc);
    hevc->luma = luma;
    hevc->stride = stride;
    for (unsigned i = 0; i < 16; i++)
        hevc->places[i] = i / 4 * stride + i % 4;
    memset(hevc->above, DC, sizeof hevc->above);
    for (unsigned y = 0; y < hevc->height; y += side) {
        memset(hevc->left, DC, sizeof hevc->left);
        for (unsigned x = 0; x < hevc->width && !hevc->refused; x += side) {
            const unsigned is_right = x + side == hevc->width, is_lowest = y + side == hevc->height;
            decode_quadtree(hevc, (block){x, y, hevc->ctb, y && !is_right ? ABOVE_RIGHT : 0u});
            hevc->refused |= hevc->in.at > hevc->in.end + hevc->in.spare / 8;
            expect(hevc, decode_bin(hevc, END_OF_SLICE), is_right & is_lowest); /* reads too far */
        }
    }
    return hevc->refused ? -1 : 0;
}
