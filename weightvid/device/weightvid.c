/* The reader of weightvid archives; FORMAT.md, whose sections are named below, is the text to it. */
#include "weightvid.h"

#include "hevc.h"

#include <stdlib.h>
#include <string.h>

#if defined(__clang__) || !defined(__GNUC__)
#pragma STDC FP_CONTRACT OFF
#endif

#define RETURN_IF(call) do { wv_status status_ = (call); if (status_) return status_; } while (0)
#ifdef WEIGHTVID_FUZZ /* hashes match whatever they are, so that a fuzzer gets behind them */
#define MATCHES(comparison) ((void)(comparison), 1)
#else
#define MATCHES(comparison) (comparison)
#endif
#define MAX_BODY (64u << 20)
#define MAX_PART (1u << 24)
#define MAX_ELEMENTS ((uint64_t)1 << 38)
#define MAX_SAMPLES 2228224u
enum { BAND = 64, MAX_TENSORS = 1 << 20, MAX_FRAMES = 1 << 24, MAX_ENERGY = 63, MAX_KERNEL = 1024,
       MAX_NAME = 4096, MAX_AXES = 32, MAX_GAIN = 32767, MAX_LAYERS = 16, MAX_FILES = 4096,
       MAX_BASES = 256 };
enum { R_TENSORS = 2, R_ALIASES = 4, R_METADATA = 6, R_FILES = 8, R_BASES = 10, R_LAYERS = 12, R_ABOUT = 13,
       R_FRAME = 32, R_PART = 34, R_END = 36, R_ITEMS = 48, R_DATA = 50, R_FLOATS = 54,
       R_FRAMES = 64, R_SPANS = 66, R_BOXES = 68, R_STAGES = 70, R_ROOT = 73 };
enum { HAS_FREQUENCY_STEPS = 1, HAS_ROW_STEPS = 2, HAS_ENERGIES = 4, HAS_ESCAPES = 8 };

/* --- numbers, hashes, deflate ----------------------------------------------------------------- */

static uint32_t le32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint32_t be32(const uint8_t *p)
{
    return (uint32_t)p[3] | (uint32_t)p[2] << 8 | (uint32_t)p[1] << 16 | (uint32_t)p[0] << 24;
}

static float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static uint32_t crc32_of(const uint8_t *data, size_t size)
{
    static const uint32_t table[16] = {
        0x00000000, 0x1DB71064, 0x3B6E20C8, 0x26D930AC, 0x76DC4190, 0x6B6B51F4, 0x4DB26158, 0x5005713C,
        0xEDB88320, 0xF00F9344, 0xD6D6A3E8, 0xCB61B38C, 0x9B64C2B0, 0x86D3D2D4, 0xA00AE278, 0xBDBDF21C};
    uint32_t crc = 0xFFFFFFFFu;
    for (; size; size--) {
        crc ^= *data++;
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return ~crc;
}

typedef struct sha256 {
    uint32_t state[8];
    uint64_t bytes;
    uint8_t block[64];
} sha256;

static void sha_block(uint32_t *state, const uint8_t *block)
{
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64], window[64 + 8], *s = window + 64; /* it moves, so that its words need not */
    memcpy(s, state, 8 * sizeof *s);
#define TURN(x, n) ((x) >> (n) | (x) << (32 - (n)))
    for (int i = 0; i < 16; i++)
        w[i] = be32(block + 4 * i);
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + (TURN(w[i - 15], 7) ^ TURN(w[i - 15], 18) ^ w[i - 15] >> 3)
             + w[i - 7] + (TURN(w[i - 2], 17) ^ TURN(w[i - 2], 19) ^ w[i - 2] >> 10);
    for (int i = 0; i < 64; i++) {
        uint32_t t1 = s[7] + (TURN(s[4], 6) ^ TURN(s[4], 11) ^ TURN(s[4], 25))
                    + (s[6] ^ (s[4] & (s[5] ^ s[6]))) + k[i] + w[i];
        uint32_t t2 = (TURN(s[0], 2) ^ TURN(s[0], 13) ^ TURN(s[0], 22))
                    + ((s[0] & s[1]) | (s[2] & (s[0] | s[1])));
        s[3] += t1;
        *--s = t1 + t2;
    }
#undef TURN
    for (int i = 0; i < 8; i++)
        state[i] += s[i];
}

static void sha_start(sha256 *sha)
{
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(sha->state, start, sizeof start);
    sha->bytes = 0;
}

static void sha_add(sha256 *sha, const uint8_t *data, size_t size)
{
    for (size_t some; size; data += some, size -= some) {
        const size_t have = sha->bytes % 64;
        some = 64 - have < size ? 64 - have : size;
        memcpy(sha->block + have, data, some);
        sha->bytes += some;
        if (have + some == 64)
            sha_block(sha->state, sha->block);
    }
}

/* Whether the hash begins with so many expected bytes. */
static int sha_is(sha256 *sha, const uint8_t *expected, size_t count)
{
    uint8_t end[72] = {0x80}, differs = 0; /* zeros, and the number of bits, fill up a block */
    const uint64_t bits = 8 * sha->bytes;
    const size_t filled = 64 - (size_t)(sha->bytes + 8) % 64;
    for (uint32_t i = 0; i < 8; i++)
        end[filled + i] = (uint8_t)(bits >> (56 - 8 * i));
    sha_add(sha, end, filled + 8);
    for (size_t i = 0; i < count; i++)
        differs |= (uint8_t)(expected[i] ^ (uint8_t)(sha->state[i / 4] >> (24 - 8 * (i & 3))));
    return !differs;
}

/* Raw deflate (RFC 1951) from memory to memory. Canonical codes are read bit by bit, by the number
   of codes of each length, as tables would be larger than what they decode. */
typedef struct inflater {
    const uint8_t *in, *end;
    uint32_t bits;
    int count, bad;
} inflater;

typedef struct code {
    uint16_t count[16], symbol[288];
} code;

static uint32_t bits_from(inflater *z, int count)
{
    while (z->count < count) {
        if (z->in == z->end) {
            z->bad = 1;
            return 0;
        }
        z->bits |= (uint32_t)*z->in++ << z->count;
        z->count += 8;
    }
    uint32_t found = z->bits & ((1u << count) - 1);
    z->bits >>= count;
    z->count -= count;
    return found;
}

/* 0: done; 1: no code, or one of a bit; less: too many, or too few. */
static int make_code(code *made, const uint8_t *lengths, int symbols)
{
    uint16_t first[16] = {0};
    int room = 1;
    memset(made->count, 0, sizeof made->count);
    for (int i = 0; i < symbols; i++)
        made->count[lengths[i]]++;
    for (int bits = 1; bits < 16; bits++) {
        room = 2 * room - made->count[bits];
        if (room < 0)
            return -1;
        if (bits < 15)
            first[bits + 1] = (uint16_t)(first[bits] + made->count[bits]);
    }
    for (int i = 0; i < symbols; i++)
        if (lengths[i])
            made->symbol[first[lengths[i]]++] = (uint16_t)i;
    return !room ? 0 : symbols - made->count[0] == made->count[1] ? 1 : -1;
}

static int symbol_from(inflater *z, const code *from)
{
    int value = 0, first = 0, index = 0;
    for (int bits = 1; bits < 16; bits++) {
        value |= (int)bits_from(z, 1);
        int count = from->count[bits];
        if (value - count < first)
            return from->symbol[index + value - first];
        index += count;
        first = (first + count) << 1;
        value <<= 1;
    }
    z->bad = 1;
    return 0;
}

static void read_codes(inflater *z, int fixed, code *literals, code *distances)
{
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t lengths[320] = {0};
    int literal = 288, distance = 30;
    for (int i = 0; i < 318 && fixed; i++)
        lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : i < 288 ? 8 : 5;
    if (!fixed) {
        literal = (int)bits_from(z, 5) + 257;
        distance = (int)bits_from(z, 5) + 1;
        int few = (int)bits_from(z, 4) + 4;
        for (int i = 0; i < few; i++)
            lengths[order[i]] = (uint8_t)bits_from(z, 3);
        if (literal > 286 || distance > 30 || make_code(literals, lengths, 19))
            z->bad = 1;
        for (int i = 0; i < literal + distance && !z->bad;) {
            int symbol = symbol_from(z, literals), repeat = 1;
            uint8_t length = (uint8_t)symbol;
            if (symbol > 15) {
                length = symbol == 16 && i ? lengths[i - 1] : 0;
                z->bad |= symbol == 16 && !i;
                repeat = symbol == 18 ? 11 + (int)bits_from(z, 7) : 3 + (int)bits_from(z, symbol - 14);
            }
            if (repeat > literal + distance - i)
                z->bad = 1;
            else
                for (; repeat; repeat--)
                    lengths[i++] = length;
        }
        z->bad |= !lengths[256];
    }
    if (z->bad || make_code(literals, lengths, literal) < 0
        || (make_code(distances, lengths + literal, distance) < 0 && !fixed))
        z->bad = 1;
}

/* A length or distance, less the least: of each number of extra bits there are so many codes, of 0 twice. */
static size_t number_from(inflater *z, int symbol, int codes)
{
    const int extra = symbol < 2 * codes ? 0 : symbol / codes - 1;
    const size_t start = symbol < codes ? (size_t)symbol : (size_t)(codes + symbol % codes) << extra;
    return start + bits_from(z, extra);
}

static int inflate(const uint8_t *data, size_t size, uint8_t *out, size_t room)
{
    inflater z = {data, data + size, 0, 0, 0};
    code literals, distances;
    size_t have = 0;
    int last = 0;
    while (!last && !z.bad) {
        last = (int)bits_from(&z, 1);
        uint32_t kind = bits_from(&z, 2);
        if (kind == 0) {
            z.bits = 0;
            z.count = 0;
            uint32_t some = bits_from(&z, 16);
            if ((some ^ bits_from(&z, 16)) != 0xFFFF || some > room - have)
                return -1;
            for (; some && !z.bad; some--)
                out[have++] = (uint8_t)bits_from(&z, 8);
            continue;
        }
        if (kind == 3)
            return -1;
        read_codes(&z, kind == 1, &literals, &distances);
        while (!z.bad) {
            const int symbol = symbol_from(&z, &literals);
            size_t length = 1, distance = 0;
            if (symbol == 256)
                break;
            if (symbol > 256) {
                length = symbol == 285 ? 258 : 3 + number_from(&z, symbol - 257, 4);
                distance = 1 + number_from(&z, symbol_from(&z, &distances), 2);
            }
            if (z.bad || symbol > 285 || distance > have || length > room - have)
                return -1;
            for (; length; length--, have++)
                out[have] = distance ? out[have - distance] : (uint8_t)symbol;
        }
    }
    return z.bad || have != room || z.in != z.end ? -1 : 0;
}

/* --- the archive ------------------------------------------------------------------------------ */

/* Bytes of a record, read one field after the other; the first fault stays. */
typedef struct fields {
    const uint8_t *at, *end;
    wv_status bad;
} fields;

typedef struct buffer {
    uint8_t *data;
    size_t room;
} buffer;

enum { NOTHING, PARTS, ITEMS };

/* What a tensor needs while it arrives. */
typedef struct work {
    uint8_t *room;       /* to be filled; NULL: skipped */
    uint8_t *into;       /* where layers are summed: the room, or memory of our own */
    wv_dtype as;         /* type of the elements there */
    uint8_t *below;      /* what was there before a layer that comes in pieces: the file may end */
    /* of the layer at hand */
    int begun, added;    /* NOTHING, PARTS, ITEMS */
    uint64_t have;       /* elements that are there */
    sha256 sha;          /* of a quantized layer, if it is `hashed` */
    int hashed;
} work;

typedef struct tensor {
    wv_tensor is;
    work *work;          /* NULL: not begun, or done */
    uint32_t mask;       /* section 3.1 */
    uint8_t layer, left; /* layers that are there, and to come */
    uint8_t done;
} tensor;

typedef struct side_file {
    const char *path;
    uint64_t offset;
    uint32_t bytes;
} side_file;

typedef struct basis {
    const uint8_t *numbers;
    uint32_t size;
} basis;

/* Escapes of a part that are to come. */
typedef struct escapes {
    fields gaps;
    const uint8_t *numbers; /* four planes of so many bytes */
    uint32_t count, left;
    uint64_t next; /* place */
} escapes;

/* A part (section 4) and the state of its arrival. */
typedef struct part {
    tensor *of;
    uint64_t first;           /* element */
    uint32_t column, rows, columns, channels, kernel, size, have, axes;
    const basis *bases[4];
    uint8_t method, shift;
    float step;
    const uint8_t *frequency_steps, *row_steps, *energies;
    escapes escapes;
    uint8_t *levels;          /* as samples, row by row: at the end of the part's room, or in `memory` */
    uint8_t *memory;
} part;

enum { AT_FTYP, AT_MOOV, AT_HEADER, AT_BODY, AT_MOOF, AT_MDAT, AT_END };

struct wv_archive {
    wv_allocator memory;
    wv_decoder decoder;
    wv_checks checks;
    wv_reader reader;
    const uint8_t *data;     /* all of the file, if it is in memory */
    int stage, decoder_open, stream;
    uint32_t width, height;
    uint32_t shown;          /* number of the frame that the built-in decoder shows, and 1; */
    uint8_t shown_hash[32];  /* what its sidecar said */
    /* of the header */
    uint32_t tensors, names, found_files, found_pairs, found_bases, table_size;
    tensor *all;             /* tensors, then aliases; in the same memory: */
    side_file *files;
    const char **pairs;
    basis *bases;
    uint32_t *table;         /* of names: place + 1, by hash */
    wv_archive *base;        /* what an update adds to, and its root in the header */
    const uint8_t *base_root, *root;
    uint32_t layers, all_layers; /* read, of all */
    uint64_t body;           /* where it begins, behind side files */
    fields lists[4];         /* of the index: frames, spans, boxes, stages */
    buffer header, index;    /* bodies */
    /* Of the box at hand. What a packet was read into is free for work once it is decoded. */
    buffer packet, sidecar;
    fields sidecar_body;
    part part;
    int goes_on;             /* the part, in the next frame; */
    uint8_t *kept;           /* its sidecar, until then */
    const uint8_t *frame_hash;
    uint8_t head[8];
    size_t box_have, box_size; /* of a stream, with its head */
    /* of what is read */
    const wv_sink *sink;
    tensor *only;            /* that is wanted; NULL: all are */
    int levels;              /* it is wanted as integers */
    float levels_step;
    uint32_t frame, done;    /* tensors that are done */
    uint32_t switches, exact_seen; /* times that frames came after exact boxes */
    wv_status failed;
    size_t scratch;
    uint8_t *luma;           /* of the built-in decoder */
    wv_hevc *hevc;
};

static void *take_memory(const wv_allocator *from, size_t bytes)
{
    bytes += !bytes;
    return from->alloc ? from->alloc(from->user, bytes) : malloc(bytes);
}

static void give_memory(const wv_archive *a, void *memory)
{
    if (memory && a->memory.alloc)
        a->memory.free(a->memory.user, memory);
    else
        free(memory);
}

/* Gives a buffer other room, if it has too little or far too much; so many of its bytes stay. */
static wv_status resize(wv_archive *a, buffer *b, size_t kept, size_t bytes)
{
    uint8_t *old = b->data;
    if (old && b->room >= bytes && (kept || b->room / 2 <= bytes))
        return WV_OK;
    if (!kept) {
        give_memory(a, old);
        old = NULL;
    }
    b->data = take_memory(&a->memory, bytes);
    b->room = bytes;
    if (b->data && kept)
        memcpy(b->data, old, kept);
    give_memory(a, old);
    return b->data ? WV_OK : WV_MEMORY;
}

static const uint8_t *take(fields *f, uint64_t count)
{
    static const uint8_t nothing[64] = {0};
    const uint8_t *found = f->at;
    if (f->bad || count > (uint64_t)(f->end - f->at)) {
        f->bad = f->bad ? f->bad : WV_FORMAT;
        f->at = f->end;
        return count <= sizeof nothing ? nothing : NULL;
    }
    f->at += count;
    return found;
}

static uint64_t leb(fields *f, uint64_t limit)
{
    uint64_t value = 0, above = 0, byte = 0x80;
    for (int shift = 0; byte & 0x80 && shift < 70; shift += 7) {
        byte = *take(f, 1);
        value |= shift < 63 ? (byte & 0x7F) << shift : 0;
        above |= shift < 63 ? 0 : byte & 0x7F;
    }
    if (!f->bad)
        f->bad = byte & 0x80 ? WV_FORMAT : above || value > limit ? WV_LIMIT : WV_OK;
    return f->bad ? 0 : value;
}

static fields sub(fields *f, uint64_t limit)
{
    uint64_t size = leb(f, limit);
    const uint8_t *data = take(f, size);
    return (fields){data, f->bad ? data : data + size, f->bad};
}

static wv_status ends(const fields *f)
{
    return f->bad ? f->bad : f->at == f->end ? WV_OK : WV_FORMAT;
}

/* A text of UTF-8, surrogates allowed. */
static fields text(fields *f, uint64_t limit)
{
    fields found = sub(f, limit);
    const uint8_t *p = found.at;
    while (p && p < found.end && !f->bad) {
        int more = *p < 0x80 ? 0 : *p < 0xC2 ? -1 : *p < 0xE0 ? 1 : *p < 0xF0 ? 2 : *p < 0xF5 ? 3 : -1;
        int bad = more < 0 || more > found.end - p - 1;
        for (int i = 1; !bad && i <= more; i++)
            bad = (p[i] & 0xC0) != 0x80;
        if (bad || (*p == 0xE0 && p[1] < 0xA0) || (*p == 0xF0 && p[1] < 0x90) || (*p == 0xF4 && p[1] > 0x8F))
            f->bad = WV_FORMAT;
        p += more + 1;
    }
    return found;
}

static uint32_t size_of(wv_dtype type)
{
    static const uint8_t sizes[24] = {8, 4, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 8, 16, 4, 8, 4, 2, 1, 8, 4, 2, 1, 1};
    return sizes[type];
}

/* Bytes of an element in a wanted type; 0: there is no such conversion. */
static uint32_t size_as(const wv_tensor *t, wv_dtype type)
{
    if (type == WV_STORED || type == t->dtype)
        return size_of(t->dtype);
    return t->dtype > WV_BF16 ? 0 : type == WV_F32 ? 4 : type == WV_F16 ? 2 : 0;
}

size_t wv_bytes(const wv_tensor *t, wv_dtype type)
{
    uint64_t bytes = t ? t->elements * size_as(t, type) : 0;
    return bytes > SIZE_MAX ? 0 : (size_t)bytes;
}

/* The next record (section 2). */
static int record(fields *body, uint64_t *type, fields *data)
{
    if (body->bad || body->at == body->end)
        return 0;
    *type = leb(body, (uint64_t)1 << 32);
    *data = sub(body, MAX_BODY);
    return !body->bad;
}

/* Finds the records of a body, of which each comes once at most: found[0] is that of the first type,
   and so on; `known` has a bit for each type that there is. Others are skipped if they are odd. */
static wv_status collect(fields body, uint32_t first, uint32_t known, fields *found)
{
    uint64_t type;
    fields data;
    while (record(&body, &type, &data)) {
        const uint64_t place = type - first;
        const int is_known = place < 32 && known >> place & 1;
        if (is_known ? found[place].at != NULL : !(type & 1))
            return is_known ? WV_FORMAT : WV_VERSION;
        if (is_known)
            found[place] = data;
    }
    return body.bad;
}

/* The number of entries that begins a record; of one that is not there, 0. No entry is empty. */
static uint32_t entries(fields *f, uint64_t limit)
{
    const uint64_t count = f->at ? leb(f, limit) : 0;
    if (f->bad || !count || count <= (uint64_t)(f->end - f->at))
        return (uint32_t)count;
    f->bad = WV_FORMAT;
    return 0;
}

/* A box, and where its payload lies (of ours behind the extended type). */
typedef struct box {
    const uint8_t *kind, *payload;
    size_t size;
    int ours;
} box;

enum { OTHER, HEADER, FILE_BOX, FRAME, EXACT, INDEX };

/* Body of a box of ours (section 2): in *room, which grows, if it is deflated or copied, as the box goes. */
static wv_status open_body(wv_archive *a, const box *b, buffer *room, int copied, fields *body)
{
    if (b->size < 9 || !MATCHES(crc32_of(b->payload + 4, b->size - 4) == le32(b->payload)))
        return WV_DIGEST;
    const uint8_t *from = b->payload + 9;
    const uint32_t bytes = le32(b->payload + 5), form = b->payload[4];
    if (form > 1 || bytes > MAX_BODY)
        return WV_LIMIT;
    if (form ? bytes / 1032 > b->size : bytes != b->size - 9) /* deflate makes no more of a byte */
        return WV_FORMAT;
    if (form || copied)
        RETURN_IF(resize(a, room, 0, bytes));
    if (form && inflate(from, b->size - 9, room->data, bytes))
        return WV_FORMAT;
    if (copied && !form)
        memcpy(room->data, from, bytes);
    body->at = form || copied ? room->data : from;
    body->end = body->at + bytes;
    body->bad = WV_OK;
    return WV_OK;
}

/* --- header and track (sections 3 and 8) ------------------------------------------------------ */

/* Place of a name in the table: that of an equal one, or an empty one. */
static uint32_t *slot_of(const wv_archive *a, const char *name, size_t bytes)
{
    uint32_t at = 2166136261u;
    for (size_t i = 0; i < bytes; i++)
        at = (at ^ (uint8_t)name[i]) * 16777619u;
    for (at ^= at >> 15;; at++) {
        uint32_t *slot = a->table + (at & (a->table_size - 1));
        const wv_tensor *t = *slot ? &a->all[*slot - 1].is : NULL;
        if (!t || (t->name_bytes == bytes && !memcmp(t->name, name, bytes)))
            return slot;
    }
}

/* A text of the header, as one of C: it moves over its length, which gives room for a zero byte. */
static const char *c_text(wv_archive *a, fields *f, uint64_t limit, size_t *bytes)
{
    const fields found = text(f, limit);
    if (f->bad)
        return NULL;
    *bytes = (size_t)(found.end - found.at);
    uint8_t *to = a->header.data + (found.at - a->header.data) - 1;
    memmove(to, found.at, *bytes);
    to[*bytes] = 0;
    return (const char *)to;
}

/* Type and shape of a tensor; its sizes go to `sizes`. Returns where those of the next one go. */
static uint64_t *read_shape(wv_tensor *t, fields *f, uint64_t *sizes)
{
    uint64_t product = 1;
    t->dtype = (wv_dtype)leb(f, WV_BOOL);
    t->axes = (uint32_t)leb(f, MAX_AXES);
    t->shape = sizes;
    t->elements = 1;
    for (uint32_t axis = 0; axis < t->axes && !f->bad; axis++) {
        const uint64_t size = *sizes++ = leb(f, MAX_ELEMENTS);
        if (size > MAX_ELEMENTS / product)
            f->bad = WV_LIMIT;
        product *= size ? size : 1;
        t->elements *= size;
    }
    return sizes;
}

/* Whether the base, if one was given, is the one that the header names, with all its layers. */
static wv_status check_base(const wv_archive *a)
{
    const wv_archive *b = a->base;
    return !b || (a->base_root && b->root && MATCHES(!memcmp(b->root, a->base_root, 32))
                  && b->layers >= b->all_layers && (!b->base_root || b->base)) ? WV_OK : WV_BASE;
}

/* Where a tensor is, of the layers that are read: section 3.1. */
static uint32_t mask_of(const wv_archive *a, const tensor *t)
{
    return t->mask & ((2u << a->layers) - 1);
}

static wv_status read_layers(wv_archive *a, fields f)
{
    a->all_layers = f.at ? (uint32_t)leb(&f, MAX_LAYERS) : 1;
    const fields root = f.at ? sub(&f, 32) : f;
    a->base_root = root.at == root.end ? NULL : root.at;
    for (uint32_t i = 0; i < a->tensors; i++) {
        const uint32_t mask = a->all[i].mask = f.at ? (uint32_t)leb(&f, (2u << a->all_layers) - 1) : 2;
        if (!f.bad && (!mask || (mask & 1 && !a->base_root)))
            f.bad = WV_FORMAT;
    }
    if (!f.bad && (!a->all_layers || (a->base_root && root.end - root.at != 32)))
        f.bad = WV_FORMAT;
    return ends(&f);
}

/* Memory for all that the header lists. */
static wv_status make_lists(wv_archive *a, uint64_t axes, uint64_t **sizes)
{
    for (a->table_size = 2; a->table_size < 2 * a->names;)
        a->table_size *= 2;
    const size_t bytes = a->names * sizeof *a->all + (size_t)axes * sizeof **sizes
        + a->found_files * sizeof *a->files + 2 * a->found_pairs * sizeof *a->pairs
        + a->found_bases * sizeof *a->bases + a->table_size * sizeof *a->table;
    a->all = take_memory(&a->memory, bytes);
    if (!a->all)
        return WV_MEMORY;
    memset(a->all, 0, bytes);
    a->scratch += bytes;
    *sizes = (uint64_t *)(void *)(a->all + a->names);
    a->files = (side_file *)(void *)(*sizes + axes);
    a->pairs = (const char **)(void *)(a->files + a->found_files);
    a->bases = (basis *)(void *)(a->pairs + 2 * a->found_pairs);
    a->table = (uint32_t *)(void *)(a->bases + a->found_bases);
    return WV_OK;
}

static wv_status read_header(wv_archive *a, fields body)
{
    fields found[R_ABOUT - R_TENSORS + 1] = {{0}};
    fields *tensors = found, *aliases = found + (R_ALIASES - R_TENSORS), *pairs = found + (R_METADATA - R_TENSORS),
           *files = found + (R_FILES - R_TENSORS), *bases = found + (R_BASES - R_TENSORS);
    uint64_t axes = 0, *sizes;
    size_t bytes = 0;
    RETURN_IF(collect(body, R_TENSORS, 0xD55, found));
    a->tensors = entries(tensors, MAX_TENSORS);
    a->names = a->tensors + entries(aliases, MAX_TENSORS);
    a->found_pairs = entries(pairs, MAX_TENSORS);
    a->found_files = entries(files, MAX_FILES);
    a->found_bases = entries(bases, MAX_BASES);
    fields ahead = *tensors;
    for (uint32_t i = 0; i < a->tensors && !ahead.bad; i++) {
        sub(&ahead, MAX_NAME);
        leb(&ahead, WV_BOOL);
        for (uint64_t few = leb(&ahead, MAX_AXES); few; few--, axes++)
            leb(&ahead, MAX_ELEMENTS);
    }
    for (int i = 0; i < 5; i++)
        RETURN_IF(i ? found[2 * i].bad : ahead.bad);
    if (!tensors->at || (a->names && !a->tensors))
        return tensors->at ? WV_LIMIT : WV_FORMAT;
    RETURN_IF(make_lists(a, axes, &sizes));
    for (uint32_t i = 0; i < a->names; i++) {
        wv_tensor *t = &a->all[i].is;
        fields *f = i < a->tensors ? tensors : aliases;
        const char *name = c_text(a, f, MAX_NAME, &bytes);
        if (f == tensors) {
            sizes = read_shape(t, f, sizes);
            t->number = i;
        } else {
            *t = a->all[leb(f, a->tensors - 1)].is;
            t->alias = 1;
        }
        RETURN_IF(f->bad);
        t->name = name;
        t->name_bytes = bytes;
        uint32_t *slot = slot_of(a, name, bytes);
        if (*slot)
            return WV_FORMAT;
        *slot = i + 1;
    }
    for (uint32_t i = 0; i < 2 * a->found_pairs; i++)
        a->pairs[i] = c_text(a, pairs, MAX_BODY, &bytes);
    for (uint32_t i = 0; i < a->found_files; i++) {
        side_file *file = a->files + i;
        file->path = c_text(a, files, 1024, &bytes);
        text(files, 64);
        file->bytes = (uint32_t)leb(files, MAX_BODY);
        file->offset = a->body;
        a->body += leb(files, MAX_BODY);
    }
    for (uint32_t i = 0; i < a->found_bases; i++) {
        basis *made = a->bases + i;
        made->size = (uint32_t)leb(bases, MAX_KERNEL);
        made->numbers = take(bases, 4 * (uint64_t)made->size * made->size);
    }
    for (int i = 0; i < 5; i++)
        RETURN_IF(ends(found + 2 * i));
    RETURN_IF(read_layers(a, found[R_LAYERS - R_TENSORS]));
    return check_base(a);
}

static const uint8_t *child(const uint8_t *data, size_t size, const char *kind, size_t *found)
{
    for (size_t at = 0; at < size;) {
        size_t bytes = size - at < 8 ? 0 : be32(data + at);
        if (bytes < 8 || bytes > size - at)
            return NULL;
        if (!memcmp(data + at + 4, kind, 4)) {
            *found = bytes - 8;
            return data + at + 8;
        }
        at += bytes;
    }
    return NULL;
}

static wv_status read_moov(wv_archive *a, const uint8_t *data, size_t size)
{
    static const char path[5][5] = {"trak", "mdia", "minf", "stbl", "stsd"};
    static const char records[3][2][5] = {{"hvc1", "hvcC"}, {"av01", "av1C"}, {"avc1", "avcC"}};
    for (int i = 0; i < 5; i++)
        if (!(data = child(data, size, path[i], &size)))
            return WV_FORMAT;
    if (size < 94)
        return WV_FORMAT;
    a->width = (uint32_t)data[40] << 8 | data[41];
    a->height = (uint32_t)data[42] << 8 | data[43];
    if (!wv_hevc_memory(a->width, a->height)) /* the same sizes are allowed for all codecs */
        return WV_FORMAT;
    for (int i = 0; i < 3; i++) {
        size_t bytes;
        const uint8_t *config;
        if (memcmp(data + 12, records[i][0], 4))
            continue;
        config = child(data + 94, size - 94, records[i][1], &bytes);
        if (!config)
            return WV_FORMAT;
        RETURN_IF(a->decoder.open(a->decoder.user, records[i][0], config, bytes, a->width, a->height));
        a->decoder_open = 1;
        return WV_OK;
    }
    return WV_FORMAT;
}

/* --- from samples to weights (section 5) ------------------------------------------------------ */

/* 2^(t / 4), of a t in two's complement. */
static float quarter_octaves(uint8_t t)
{
    static const uint32_t q[4] = {0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD};
    return float_of(q[t & 3] + (uint32_t)((t ^ 128) / 4 - 32) * 0x800000u);
}

static uint16_t half_of(float value)
{
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, low = bits & 0x7FFFFFFF;
    if (low > 0x7F800000) /* NaN: its upper bits, and one that says NaN */
        return (uint16_t)(sign | 0x7C00 | (low >> 13 & 0x3FF) | ((low >> 13 & 0x3FF) ? 0 : 0x200));
    if (low >= 0x477FF000)
        return (uint16_t)(sign | 0x7C00);
    /* An addition of 2^13 times its power of two rounds to the places that a half has. */
    const uint32_t exponent = low < 0x38800000 ? 113 : low >> 23, large = (exponent + 13) << 23;
    return (uint16_t)(sign | (((exponent - 113) << 10) + bits_of(float_of(low) + float_of(large)) - large));
}

static float float_of_half(uint32_t half)
{
    uint32_t sign = (half & 0x8000) << 16, low = half & 0x7FFF;
    if (low < 0x400)
        return float_of(bits_of((float)low * 5.9604644775390625e-8f) | sign);
    return float_of(sign | (low < 0x7C00 ? (low << 13) + 0x38000000 : 0x7F800000 | (low & 0x3FF) << 13));
}

static uint16_t bfloat_of(float value)
{
    uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000)
        return (uint16_t)((bits | 0x400000) >> 16);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* Bytes of an element as a number, and back: little-endian in the file, the machine's own in memory,
   where each of a complex number's two components is. */
static uint32_t byte_at(wv_dtype type, uint32_t size, uint32_t byte)
{
    static const uint16_t one = 1;
    uint8_t little;
    memcpy(&little, &one, 1);
    if (type >= WV_C64 && type <= WV_C32 && size < 16)
        size /= 2;
    return little ? byte : byte - byte % size + size - 1 - byte % size;
}

static uint64_t get_bits(wv_dtype type, uint32_t size, const uint8_t *from)
{
    uint64_t bits = 0;
    for (uint32_t i = 0; i < size; i++)
        bits |= (uint64_t)from[byte_at(type, size, i)] << 8 * i;
    return bits;
}

static void put_bits(wv_dtype type, uint32_t size, uint64_t bits, uint8_t *to)
{
    for (uint32_t i = 0; i < size; i++)
        to[byte_at(type, size, i)] = (uint8_t)(bits >> 8 * i);
}

static float float_from(wv_dtype type, uint64_t bits)
{
    double wide;
    memcpy(&wide, &bits, 8);
    return type == WV_F64 ? (float)wide : type == WV_F32 ? float_of((uint32_t)bits)
         : type == WV_F16 ? float_of_half((uint32_t)bits) : float_of((uint32_t)bits << 16);
}

static uint64_t bits_from_float(wv_dtype type, float value)
{
    double wide = value;
    uint64_t bits;
    memcpy(&bits, &wide, 8);
    return type == WV_F64 ? bits : type == WV_F32 ? bits_of(value)
         : type == WV_F16 ? half_of(value) : bfloat_of(value);
}

/* Writes an element of a tensor, given by its bits, in a type. */
static void put_element(const tensor *t, wv_dtype as, uint64_t bits, uint8_t *to)
{
    if (as == WV_F16 && t->is.dtype == WV_F64) /* rounds once: as a float, to an odd one if not exact */
        bits = (bits >> 29 | !!(bits << 35)) << 29;
    if (as != t->is.dtype)
        bits = bits_from_float(as, float_from(t->is.dtype, bits));
    put_bits(as, size_of(as), bits, to);
}

/* Writes a row of weights: added to what is there, rounded to the tensor's type, and hashed. */
static void put_row(const tensor *t, float *row, uint32_t count, uint8_t *to)
{
    const wv_dtype type = t->is.dtype, as = t->work->as;
    const uint32_t size = size_of(type), wide = size_of(as);
    for (uint32_t i = 0; t->work->added && i < count; i++) {
        const float below = float_from(type, get_bits(type, size, to + (size_t)i * size));
        row[i] = row[i] + below;
    }
    if (type == WV_F32 && as == WV_F32 && !byte_at(type, 4, 0)) {
        memcpy(to, row, 4 * (size_t)count);
        if (t->work->hashed)
            sha_add(&t->work->sha, to, 4 * (size_t)count);
        return;
    }
    for (uint32_t i = 0; i < count; i++, to += wide) {
        const uint64_t bits = bits_from_float(type, row[i]);
        uint8_t element[8];
        for (uint32_t byte = 0; byte < size; byte++)
            element[byte] = (uint8_t)(bits >> 8 * byte);
        if (t->work->hashed)
            sha_add(&t->work->sha, element, size);
        put_element(t, as, bits, to);
    }
}

/* Type in which a tensor is wanted. */
static wv_dtype wanted_type(const wv_archive *a, const tensor *t)
{
    const wv_dtype type = a->sink->type;
    return type == WV_STORED || !size_as(&t->is, type) ? t->is.dtype : type;
}

/* The kernel matrix M (section 5.4): what a level of frequency f adds to position i. */
static wv_status kernel_matrix(const part *p, float *matrix)
{
    const float scale = (float)(1u << p->shift);
    for (uint32_t i = 0; i < p->kernel; i++) {
        float sum = 0;
        for (uint32_t f = 0; f < p->kernel; f++) {
            uint32_t block = p->kernel, u = f, v = i;
            float product = 1;
            for (uint32_t axis = 0; axis < p->axes; axis++) {
                const basis *b = p->bases[axis];
                block /= b->size;
                product = product * float_of(le32(b->numbers + 4 * (u / block * b->size + v / block)));
                u %= block;
                v %= block;
            }
            if (p->frequency_steps)
                product = product * quarter_octaves(p->frequency_steps[f]);
            /* To the nearest integer, ties to even, as additions round. */
            volatile float rounded = product * scale + 12582912.0f;
            const float m = rounded - 12582912.0f;
            matrix[(size_t)f * p->kernel + i] = m;
            sum += m < 0 ? -m : m;
            if (!(sum <= MAX_GAIN))
                return WV_LIMIT;
        }
    }
    return WV_OK;
}

/* The next escape (section 5.2) before a place of the part. */
static int next_escape(escapes *e, uint64_t end, uint64_t *place, float *number)
{
    if (!e->left || e->next >= end)
        return 0;
    *place = e->next;
    uint32_t bits = 0;
    for (size_t plane = 4; plane--;)
        bits = bits << 8 | e->numbers[plane * e->count];
    *number = float_of(bits);
    e->numbers++;
    if (--e->left)
        e->next += leb(&e->gaps, MAX_PART) + 1;
    return 1;
}

/* Numbers of a row of samples, escapes aside (section 5.2). */
static void numbers_of(const part *p, const uint8_t *samples, float *n)
{
    const uint32_t columns = p->columns, trellis = p->method;
    uint32_t state = 0;
    for (uint32_t j = 0; j < columns; j++) {
        const int32_t sample = samples[j]; /* odd where the level is */
        int32_t number = sample - 128;
        if (trellis) {
            number = 4 * number + (int32_t)(2 * ((state ^ state >> 1 ^ state >> 2) & 1));
            state = state << 1 | ((state >> 4 ^ (uint32_t)sample) & 1);
        }
        n[j] = (float)number;
    }
}

/* Sums of a row, escapes aside (section 5.4). */
static void transform(const part *p, const float *matrix, const float *n, float *sums)
{
    for (uint32_t c = 0; c < p->channels; c++, sums += p->kernel) {
        memset(sums, 0, p->kernel * sizeof *sums);
        for (uint32_t f = 0; f < p->kernel; f++) {
            const float level = n[(size_t)f * p->channels + c], *weights = matrix + (size_t)f * p->kernel;
            for (uint32_t i = 0; level != 0 && i < p->kernel; i++)
                sums[i] = sums[i] + level * weights[i];
        }
    }
}

static wv_status put_integers(const float *numbers, uint32_t count, uint8_t *to)
{
    for (uint32_t i = 0; i < count; i++, to += 4) {
        if (!(numbers[i] > -2147483648.0f && numbers[i] < 2147483648.0f))
            return WV_LEVELS;
        const int32_t whole = (int32_t)numbers[i];
        memcpy(to, &whole, 4);
    }
    return WV_OK;
}

/* Weights of a part from its levels, from the first row to the last: a row is written where the
   levels of later rows don't lie. */
static wv_status dequantize(wv_archive *a, part *p)
{
    const uint32_t columns = p->columns, kernel = p->axes ? p->kernel : 0;
    const uint32_t wide = a->levels ? 4 : size_of(p->of->work->as);
    const size_t numbers = (size_t)kernel * kernel + (kernel ? 2 : 1) * (size_t)columns;
    RETURN_IF(resize(a, &a->packet, 0, sizeof(float) * numbers));
    float *values = (float *)(void *)a->packet.data, *n = kernel ? values + columns : values;
    float *matrix = n + columns;
    if (kernel)
        RETURN_IF(kernel_matrix(p, matrix));
    const float step = p->step * float_of((127u - p->shift - (p->method ? 2 : 0)) << 23);
    const float unit = a->levels ? 1 : step;
    uint8_t *out = p->of->work->into + p->first * wide;
    for (uint32_t row = 0; row < p->rows; row++, out += (size_t)columns * wide) {
        const uint64_t begin = (uint64_t)row * columns, end = begin + columns;
        const float factor = p->row_steps ? quarter_octaves(p->row_steps[row]) : 1;
        escapes again = p->escapes;
        uint64_t place;
        float number;
        numbers_of(p, p->levels + begin, n);
        while (next_escape(&p->escapes, end, &place, &number))
            n[place - begin] = kernel ? 0 : number;
        if (kernel)
            transform(p, matrix, n, values);
        while (kernel && next_escape(&again, end, &place, &number)) {
            const uint32_t at = (uint32_t)(place - begin), f = at / p->channels, c = at % p->channels;
            for (uint32_t i = 0; i < kernel; i++) {
                const float product = number * matrix[(size_t)f * kernel + i];
                values[(size_t)c * kernel + i] = values[(size_t)c * kernel + i] + product;
            }
        }
        for (uint32_t j = 0; j < columns; j++) {
            const float value = values[j] * unit;
            values[j] = value * factor;
        }
        if (a->levels)
            RETURN_IF(put_integers(values, columns, out));
        else
            put_row(p->of, values, columns, out);
    }
    p->of->work->have += p->size;
    return WV_OK;
}

/* --- parts and frames (sections 4 and 5.1) ---------------------------------------------------- */

static wv_status parse_part(const wv_archive *a, fields f, part *p)
{
    memset(p, 0, sizeof *p);
    if (!a->tensors)
        return WV_LIMIT;
    p->of = a->all + leb(&f, a->tensors - 1);
    p->column = 4 * (uint32_t)leb(&f, MAX_SAMPLES);
    const uint64_t first = leb(&f, MAX_ELEMENTS);
    p->rows = (uint32_t)leb(&f, MAX_PART);
    p->columns = (uint32_t)leb(&f, MAX_PART);
    p->method = *take(&f, 1);
    const uint32_t has = *take(&f, 1);
    p->step = float_of(le32(take(&f, 4)));
    p->axes = (uint32_t)leb(&f, 4);
    p->kernel = 1;
    for (uint32_t axis = 0; axis < p->axes && !f.bad; axis++) {
        if (!a->found_bases)
            return WV_LIMIT;
        p->bases[axis] = a->bases + leb(&f, a->found_bases - 1);
        p->kernel *= p->bases[axis]->size;
        if (!p->kernel || p->kernel > MAX_KERNEL)
            return WV_FORMAT;
    }
    p->shift = p->axes ? *take(&f, 1) : 0;
    RETURN_IF(f.bad);
    const wv_tensor *t = &p->of->is;
    const uint64_t size = (uint64_t)p->rows * p->columns;
    if (!size || size > MAX_PART || p->columns % p->kernel || t->dtype > WV_BF16
        || (first + p->rows) > t->elements / p->columns || t->elements % p->columns)
        return WV_FORMAT;
    if (p->method > 1 || has > 15)
        return WV_VERSION;
    if (p->shift > 24 || (has & HAS_FREQUENCY_STEPS && !p->axes)
        || !(p->step >= 7.7037197775489434e-34f && p->step <= 1.2980742146337069e33f))
        return WV_FORMAT;
    p->size = (uint32_t)size;
    p->first = first * p->columns;
    p->channels = p->columns / p->kernel;
    if (has & HAS_FREQUENCY_STEPS)
        p->frequency_steps = take(&f, p->kernel);
    if (has & HAS_ROW_STEPS)
        p->row_steps = take(&f, p->rows);
    if (has & HAS_ENERGIES) {
        const uint32_t count = p->rows + p->channels + p->kernel;
        p->energies = take(&f, count);
        for (uint32_t i = 0; i < count && !f.bad; i++)
            if (p->energies[i] > MAX_ENERGY)
                return WV_FORMAT;
    }
    if (has & HAS_ESCAPES) {
        escapes *e = &p->escapes;
        e->count = e->left = (uint32_t)leb(&f, (uint64_t)(f.end - f.at) / 5);
        uint64_t place = 0;
        e->gaps = f;
        for (uint32_t i = 0; i < e->left; i++)
            place += leb(&f, MAX_PART) + 1;
        e->numbers = take(&f, 4 * (uint64_t)e->left);
        if (!f.bad && (!e->left || place > size))
            return WV_FORMAT;
        e->next = leb(&e->gaps, MAX_PART);
    }
    return ends(&f);
}

/* Energy of a row or a column. */
static uint32_t energy_of(const part *p, int of_columns, uint32_t i)
{
    const uint8_t *channels = p->energies + p->rows, *frequencies = channels + p->channels;
    return of_columns ? (uint32_t)channels[i % p->channels] + frequencies[i / p->channels] : p->energies[i];
}

/* Rows or columns by falling energy, equal ones in their own order; where each energy starts. */
static void sort_falling(const part *p, int of_columns, uint32_t *order, uint32_t *start)
{
    const uint32_t count = of_columns ? p->columns : p->rows;
    uint32_t next[2 * MAX_ENERGY + 1] = {0}, at = 0;
    for (uint32_t i = 0; i < count; i++)
        next[energy_of(p, of_columns, i)]++;
    start[2 * MAX_ENERGY + 1] = 0;
    for (int e = 2 * MAX_ENERGY; e >= 0; e--) {
        start[e] = at + next[e]; /* the end of e, and the start of e - 1 */
        next[e] = at;
        at = start[e];
    }
    for (uint32_t i = 0; i < count; i++)
        order[next[energy_of(p, of_columns, i)]++] = i;
}

/* A picture, and the levels of a part in it: from number `first`, in a ribbon column, to `end`. */
typedef struct picture {
    const uint8_t *luma;
    size_t stride;
    uint32_t width, column, first, end;
} picture;

/* Takes levels, the first of which has a number, to their places in a row; NULL: one after the other. */
static void take_levels(const picture *from, uint32_t number, uint32_t count, const uint32_t *places,
                        uint8_t *row)
{
    const size_t stride = from->stride;
    for (uint32_t i = 0, stop; i < count; number += stop - i, i = stop) {
        stop = BAND - number % BAND < count - i ? i + BAND - number % BAND : count;
        if (number < from->first || number >= from->end)
            continue;
        const uint32_t column = from->column + (number - from->first) / BAND;
        const uint32_t y = column / from->width * BAND + number % BAND;
        const uint8_t *sample = from->luma + y * stride + column % from->width;
        if (places)
            for (uint32_t j = i; j < stop; j++, sample += stride)
                row[places[j]] = *sample;
        else
            for (uint32_t j = i; j < stop; j++, sample += stride)
                row[j] = *sample;
    }
}

/* Walks over the part in the order of section 5.1: in each picture from the start. */
static wv_status take_sorted(wv_archive *a, const picture *from)
{
    const part *p = &a->part;
    uint32_t row_start[2 * MAX_ENERGY + 2], column_start[2 * MAX_ENERGY + 2], number = 0;
    RETURN_IF(resize(a, &a->packet, 0, 4 * ((size_t)p->rows + p->columns)));
    uint32_t *rows = (uint32_t *)(void *)a->packet.data, *columns = rows + p->rows;
    sort_falling(p, 0, rows, row_start);
    sort_falling(p, 1, columns, column_start);
    for (int class_ = 3 * MAX_ENERGY; class_ >= 0; class_--)
        for (int e = class_ < MAX_ENERGY ? class_ : MAX_ENERGY; e >= 0 && class_ - e <= 2 * MAX_ENERGY; e--) {
            const uint32_t first = column_start[class_ - e + 1], count = column_start[class_ - e] - first;
            for (uint32_t row = row_start[e + 1]; count && row < row_start[e] && number < from->end; row++) {
                take_levels(from, number, count, columns + first, p->levels + (size_t)rows[row] * p->columns);
                number += count;
            }
        }
    return WV_OK;
}

static void drop_part(wv_archive *a)
{
    give_memory(a, a->part.memory);
    give_memory(a, a->kept);
    a->part.memory = a->kept = NULL;
    a->goes_on = 0;
}

/* Takes the part's levels from a picture, from a ribbon column on, as far as there are; a whole part
   becomes weights. */
static wv_status gather(wv_archive *a, uint32_t column, const uint8_t *luma, size_t stride)
{
    part *p = &a->part;
    const uint32_t room = (a->height / BAND * a->width - column) * BAND;
    const uint32_t end = p->size - p->have < room ? p->size : p->have + room;
    const picture from = {luma, stride, a->width, column, p->have, end};
    if (p->energies)
        RETURN_IF(take_sorted(a, &from));
    else
        take_levels(&from, 0, p->size, NULL, p->levels);
    p->have = end;
    a->goes_on = p->have < p->size;
    if (a->goes_on)
        return WV_OK;
    RETURN_IF(dequantize(a, p));
    drop_part(a);
    return WV_OK;
}

/* Gets the elements that a tensor of an update has in the base. */
static wv_status from_base(wv_archive *a, const tensor *t)
{
    if (!a->base)
        return WV_BASE;
    const uint32_t found = *slot_of(a->base, t->is.name, t->is.name_bytes);
    const wv_tensor *b = found ? &a->base->all[found - 1].is : NULL;
    if (!b || b->dtype != t->is.dtype || b->axes != t->is.axes
        || (b->axes && memcmp(b->shape, t->is.shape, b->axes * sizeof *b->shape)))
        return WV_BASE;
    return wv_load(a->base, b, t->work->as, t->work->into, wv_bytes(b, t->work->as));
}

static void finish_tensor(wv_archive *a, tensor *t, wv_status status)
{
    t->done = 1;
    a->done++;
    if (!t->work)
        return;
    const work w = *t->work;
    const wv_dtype type = t->is.dtype, as = wanted_type(a, t);
    const uint32_t size = size_of(type), wide = size_of(as);
    if (w.below && status == WV_COARSE)
        memcpy(w.into, w.below, (size_t)t->is.elements * size);
    if (w.into != w.room) {
        for (uint64_t i = 0; (!status || status == WV_COARSE) && i < t->is.elements; i++)
            put_element(t, as, get_bits(type, size, w.into + i * size), w.room + i * wide);
        give_memory(a, w.into);
    }
    give_memory(a, w.below);
    give_memory(a, t->work);
    t->work = NULL;
    if (w.room && !a->only)
        a->sink->end(a->sink->user, &t->is, w.room, status);
}

static void finish_layer(wv_archive *a, tensor *t)
{
    give_memory(a, t->work->below);
    t->work->below = NULL;
    t->work->begun = NOTHING;
    t->layer++;
    if (!--t->left)
        finish_tensor(a, t, WV_OK);
}

/* Asks for the room of a tensor, and gets what its first layer is added to. */
static wv_status begin_tensor(wv_archive *a, tensor *t)
{
    const uint32_t mask = mask_of(a, t), added = mask & (mask - 1);
    const wv_dtype type = t->is.dtype, as = wanted_type(a, t);
    const uint64_t bytes = t->is.elements * size_of(as), own = t->is.elements * size_of(type);
    if (bytes > SIZE_MAX || own > SIZE_MAX)
        return WV_MEMORY;
    work *w = t->work = take_memory(&a->memory, sizeof *w);
    if (!w)
        return WV_MEMORY;
    memset(w, 0, sizeof *w);
    w->as = as;
    w->into = w->room = a->only ? a->sink->user : a->sink->begin(a->sink->user, &t->is, (size_t)bytes);
    if (w->room && added && as != type) { /* layers are added in the tensor's own type */
        uint8_t *into = take_memory(&a->memory, (size_t)own);
        if (!into)
            return WV_MEMORY;
        w->into = into;
        w->as = type;
    }
    return w->room && mask & 1 ? from_base(a, t) : WV_OK;
}

/* Begins a layer of a tensor, or goes on with it, by so many elements. */
static wv_status begin(wv_archive *a, tensor *t, int kind, uint64_t some)
{
    if (a->only && a->only != t)
        return WV_OK;
    if (t->done)
        return WV_FORMAT;
    if (!t->work)
        RETURN_IF(begin_tensor(a, t));
    work *w = t->work;
    if (w->begun == NOTHING) {
        w->begun = kind;
        w->added = t->layer || t->mask & 1;
        w->have = 0;
        w->hashed = 0;
        /* A layer that comes in pieces may end early; then those below it are wanted. */
        if (w->room && t->layer && some < t->is.elements && !a->only) {
            const size_t bytes = (size_t)t->is.elements * size_of(t->is.dtype);
            w->below = take_memory(&a->memory, bytes);
            if (!w->below)
                return WV_MEMORY;
            memcpy(w->below, w->into, bytes);
        }
    }
    return w->begun == kind ? WV_OK : WV_FORMAT;
}

static int is_wanted(const tensor *t)
{
    return t->work && t->work->room;
}

static wv_status start_part(wv_archive *a, part *p)
{
    work *w = p->of->work;
    const uint32_t wide = a->levels ? 4 : size_of(w->as);
    if (p->first != w->have)
        return WV_FORMAT;
    if (a->levels && (p->method || p->axes || p->row_steps))
        return WV_LEVELS;
    if (a->levels && !p->first)
        a->levels_step = p->step;
    if (!p->first && !a->levels && (w->added || a->checks == WV_CHECK_ALL)) {
        w->hashed = 1;
        sha_start(&w->sha);
    }
    p->levels = w->into + (p->first + p->size) * wide - p->size;
    if (w->added) {
        p->levels = p->memory = take_memory(&a->memory, p->size);
        if (!p->memory)
            return WV_MEMORY;
    }
    return WV_OK;
}

static wv_status take_end(wv_archive *a, fields f)
{
    if (!a->tensors)
        return WV_LIMIT;
    tensor *t = a->all + leb(&f, a->tensors - 1);
    const uint8_t *head = take(&f, 8);
    take(&f, 2);
    RETURN_IF(ends(&f));
    if (a->levels || (a->only && a->only != t))
        return WV_OK;
    if (!t->work || t->work->begun != PARTS || (t->work->room && t->work->have != t->is.elements))
        return WV_FORMAT;
    if (t->work->hashed && !MATCHES(sha_is(&t->work->sha, head, 8))) {
        finish_tensor(a, t, WV_DIGEST);
        return WV_DIGEST;
    }
    finish_layer(a, t);
    return WV_OK;
}

/* Decodes a frame and compares its hash. */
static wv_status decode(wv_archive *a, const uint8_t *packet, size_t bytes, const uint8_t **luma, size_t *stride)
{
    sha256 sha;
    a->shown = 0;
    RETURN_IF(a->decoder.decode(a->decoder.user, packet, bytes, luma, stride));
    sha_start(&sha);
    for (uint32_t y = 0; y < a->height && a->checks != WV_CHECK_NONE; y++)
        sha_add(&sha, *luma + y * *stride, a->width);
    if (a->checks != WV_CHECK_NONE && !MATCHES(sha_is(&sha, a->frame_hash, 32)))
        return WV_DIGEST;
    a->shown = a->hevc ? a->frame + 1 : 0;
    memcpy(a->shown_hash, a->frame_hash, 32);
    return WV_OK;
}

/* Takes a frame; without its packet the one that the built-in decoder shows. */
static wv_status take_frame(wv_archive *a, const uint8_t *packet, size_t bytes)
{
    const uint8_t *luma = a->luma;
    size_t stride = a->width;
    const uint32_t capacity = a->height / BAND * a->width;
    part *p = &a->part;
    fields all, data;
    uint64_t type, free = 0;
    if (packet)
        RETURN_IF(decode(a, packet, bytes, &luma, &stride));
    if (a->goes_on) {
        free = (p->size - p->have + BAND - 1) / BAND;
        RETURN_IF(gather(a, 0, luma, stride));
    }
    for (all = a->sidecar_body; record(&all, &type, &data);) {
        if (type != R_PART)
            continue;
        if (a->goes_on)
            return WV_FORMAT;
        RETURN_IF(parse_part(a, data, p));
        if (p->column < free || p->column >= capacity)
            return WV_FORMAT;
        free = p->column + (p->size + BAND - 1) / BAND;
        RETURN_IF(begin(a, p->of, PARTS, p->size));
        if (!is_wanted(p->of))
            continue;
        RETURN_IF(start_part(a, p));
        RETURN_IF(gather(a, p->column, luma, stride));
        if (a->goes_on) {
            a->kept = a->sidecar.data;
            a->sidecar.data = NULL;
        }
    }
    for (all = a->sidecar_body; record(&all, &type, &data);)
        if (type == R_END)
            RETURN_IF(take_end(a, data));
    return all.bad;
}

/* --- exact tensors (section 6) ---------------------------------------------------------------- */

/* Puts the bits of an exact element; in a layer that is added, of how far they are from those before. */
static void put_exact(const tensor *t, uint64_t place, uint64_t bits)
{
    const wv_dtype type = t->is.dtype;
    uint8_t *to = t->work->into + place * size_of(t->work->as);
    if (t->work->added)
        bits = get_bits(type, size_of(type), to) + (bits >> 1 ^ (0 - (bits & 1)));
    put_element(t, t->work->as, bits, to);
}

/* An item: elements of a tensor that follow each other. */
typedef struct item {
    tensor *of;
    uint64_t first, count;
} item;

static wv_status next_item(const wv_archive *a, fields *list, item *next)
{
    const uint64_t number = leb(list, a->tensors - 1);
    next->first = leb(list, MAX_ELEMENTS);
    next->count = leb(list, MAX_ELEMENTS);
    next->of = a->all + number;
    return list->bad ? list->bad : next->first + next->count > next->of->is.elements ? WV_FORMAT : WV_OK;
}

static wv_status begin_item(wv_archive *a, const item *one)
{
    const tensor *t = one->of;
    RETURN_IF(begin(a, one->of, ITEMS, one->count));
    if (t->work && (one->first != t->work->have || (t->work->added && t->is.dtype == WV_C128)))
        return WV_FORMAT;
    return WV_OK;
}

static void end_item(wv_archive *a, const item *one)
{
    work *w = one->of->work;
    if (!w)
        return;
    w->have += one->count;
    if (w->have == one->of->is.elements)
        finish_layer(a, one->of);
}

static wv_status take_planes(wv_archive *a, fields items, uint32_t left, fields data)
{
    while (left) {
        /* A group: items of elements of one size, whose bytes lie in planes. */
        fields ahead = items;
        uint64_t count = 0, at = 0;
        uint32_t size = 0, group = 0;
        item one;
        for (; group < left; group++) {
            RETURN_IF(next_item(a, &ahead, &one));
            if (size && size_of(one.of->is.dtype) != size)
                break;
            size = size_of(one.of->is.dtype);
            count += one.count;
        }
        if (count > MAX_BODY)
            return WV_FORMAT;
        const uint8_t *planes = take(&data, count * size);
        RETURN_IF(data.bad);
        for (left -= group; group; group--, at += one.count) {
            RETURN_IF(next_item(a, &items, &one));
            RETURN_IF(begin_item(a, &one));
            for (uint64_t i = 0; is_wanted(one.of) && i < one.count; i++) {
                uint64_t bits[2] = {0, 0}; /* an element has up to 16 bytes */
                for (uint32_t byte = 0; byte < size; byte++)
                    bits[byte / 8] |= (uint64_t)planes[byte * count + at + i] << byte % 8 * 8;
                if (size <= 8)
                    put_exact(one.of, one.first + i, bits[0]);
                for (uint32_t half = 0; half < 2 && size > 8; half++)
                    put_bits(WV_U64, 8, bits[half], one.of->work->into + (one.first + i) * size + 8 * half);
            }
            end_item(a, &one);
        }
    }
    RETURN_IF(ends(&items));
    return ends(&data);
}

/* A plane of floats; a deflated one goes to *room, which moves behind it. */
static wv_status read_plane(fields *data, uint64_t size, uint8_t **room, const uint8_t **plane)
{
    const uint64_t coded = leb(data, MAX_BODY);
    const uint8_t *from = take(data, coded ? coded : size);
    *plane = coded ? *room : from;
    if (data->bad || !coded)
        return data->bad;
    *room += size;
    return inflate(from, (size_t)coded, *room - size, (size_t)size) ? WV_FORMAT : WV_OK;
}

/* Bit-exact floats (section 6). Rows are read in their own order: where their bytes lie in the planes
   is counted by key. `planes`: keys, top, middle, low ones. */
static wv_status take_floats(wv_archive *a, const fields items, uint32_t left, fields data)
{
    const uint8_t *planes[5];
    uint64_t total = 0, rows = 0, place[96] = {0}, sum = 0;
    fields ahead = items;
    item one;
    wv_dtype type = WV_STORED;
    const fields lengths = data;
    for (uint32_t i = 0; i < left; i++) {
        RETURN_IF(next_item(a, &ahead, &one));
        uint64_t length = leb(&data, MAX_BODY);
        length += !length;
        if (i && one.of->is.dtype != type)
            return WV_FORMAT;
        type = one.of->is.dtype;
        total += one.count;
        rows += one.count / length + (one.count % length != 0);
        if (data.bad || total > MAX_BODY)
            return data.bad ? data.bad : WV_LIMIT;
    }
    RETURN_IF(ends(&ahead));
    if (type < WV_F32 || type > WV_BF16 || (3 * rows + 2 * total) / 1032 > (uint64_t)(data.end - data.at))
        return WV_FORMAT;
    const uint32_t mantissa = type == WV_F32 ? 23 : type == WV_F16 ? 10 : 7;
    const uint32_t width = 8 * size_of(type), low_planes = type == WV_F32 ? 2 : type == WV_F16;
    if (total * width / 8 > MAX_BODY)
        return WV_LIMIT;
    RETURN_IF(resize(a, &a->packet, 0, (size_t)(3 * rows + (2 + low_planes) * total)));
    uint8_t *room = a->packet.data;
    RETURN_IF(read_plane(&data, 3 * rows, &room, &planes[0]));
    /* Two walks over the rows: the first one counts. */
    for (int walk = 0;; walk++) {
        fields list = items, length_list = lengths;
        uint64_t row = 0;
        uint32_t low_scale = 0;
        for (uint32_t i = 0; i < left; i++) {
            RETURN_IF(next_item(a, &list, &one));
            const uint64_t coded_length = leb(&length_list, MAX_BODY), length = coded_length + !coded_length;
            if (walk)
                RETURN_IF(begin_item(a, &one));
            for (uint64_t done = 0, here; done < one.count; done += here, row++) {
                const uint32_t zeros = planes[0][2 * rows + row];
                low_scale = (low_scale + planes[0][row]) & 0xFF;
                const uint32_t scale = low_scale | (uint32_t)planes[0][rows + row] << 8;
                if (zeros > mantissa)
                    return WV_FORMAT;
                uint64_t *at = place + 4 * zeros + (scale & 3);
                here = one.count - done < length ? one.count - done : length;
                for (uint64_t j = *at; walk && is_wanted(one.of) && j < *at + here; j++) {
                    const uint32_t middle = planes[2][j];
                    uint32_t bits = planes[1][j] + ((middle & 0xC0) << 2) + (scale & 0xFFFC) - 128;
                    bits = (bits & ((1u << (width + 1 - mantissa)) - 1)) << (mantissa - 2);
                    bits |= (middle & 32) << (width - 6) | (middle & 31) << (mantissa - 7);
                    for (uint32_t k = 0; k < low_planes; k++)
                        if (zeros < 8 * (k + 1))
                            bits |= (uint32_t)planes[3 + k][j] << 8 * k & ((1u << (mantissa - 7)) - 1);
                    put_exact(one.of, one.first + done + (j - *at), bits);
                }
                *at += here;
            }
            if (walk)
                end_item(a, &one);
        }
        if (walk)
            return WV_OK;
        for (uint32_t key = 0; key < 96; key++) {
            const uint64_t count = place[key];
            place[key] = sum;
            sum += count;
        }
        for (uint32_t k = 0; k < 2 + low_planes; k++)
            RETURN_IF(read_plane(&data, k < 2 ? total : place[32 * (k - 1)], &room, &planes[1 + k]));
        RETURN_IF(ends(&data));
    }
}

static wv_status take_exact(wv_archive *a, const box *b)
{
    fields body, found[R_FLOATS - R_ITEMS + 1] = {{0}};
    fields *items = found, *data = found + (R_DATA - R_ITEMS), *floats = found + (R_FLOATS - R_ITEMS);
    if (a->levels)
        return WV_LEVELS;
    RETURN_IF(open_body(a, b, &a->sidecar, !a->data, &body));
    RETURN_IF(collect(body, R_ITEMS, 0x45, found));
    if (!items->at || !data->at == !floats->at)
        return WV_FORMAT;
    const uint32_t count = entries(items, MAX_TENSORS);
    if (items->bad || (count && !a->tensors))
        return items->bad ? items->bad : WV_LIMIT;
    return data->at ? take_planes(a, *items, count, *data) : take_floats(a, *items, count, *floats);
}

/* --- boxes, in the order of the file ---------------------------------------------------------- */

static void open_box(box *b, const uint8_t *kind, const uint8_t *payload, size_t size)
{
    static const char ours[5][7] = {"header", "file\0", "frame", "exact", "index"};
    *b = (box){kind, payload, size, OTHER};
    if (memcmp(kind, "uuid", 4) || size < 16 || memcmp(payload, "weightvid-", 10))
        return;
    for (int i = 0; i < 5; i++)
        if (!memcmp(payload + 10, ours[i], 6)) {
            b->ours = HEADER + i;
            b->payload += 16;
            b->size -= 16;
        }
}

static wv_status take_sidecar(wv_archive *a, const box *b)
{
    fields body, data;
    uint64_t type;
    uint32_t frames = 0;
    RETURN_IF(open_body(a, b, &a->sidecar, !a->data, &body));
    a->sidecar_body = body;
    while (record(&body, &type, &data)) {
        if (type == R_FRAME) {
            frames++;
            if (leb(&data, (uint64_t)1 << 32) != a->frame && !data.bad)
                return WV_FORMAT;
            a->frame_hash = take(&data, 32);
            RETURN_IF(ends(&data));
        } else if (type != R_PART && type != R_END && !(type & 1)) {
            return WV_VERSION;
        }
    }
    return body.bad ? body.bad : frames == 1 ? WV_OK : WV_FORMAT;
}

/* Before the first frame: tensors that have no layer in this file are those of the base. */
static wv_status start_all(wv_archive *a)
{
    a->stage = AT_BODY;
    a->frame = a->switches = a->done = a->exact_seen = 0;
    for (uint32_t i = 0; i < a->tensors; i++) {
        tensor *t = a->all + i;
        t->layer = t->left = t->done = 0;
        for (uint32_t mask = mask_of(a, t) >> 1; mask; mask &= mask - 1)
            t->left++;
        if (t->left || (a->only && a->only != t))
            continue;
        const wv_status status = mask_of(a, t) ? begin_tensor(a, t) : WV_FORMAT;
        finish_tensor(a, t, status);
        RETURN_IF(status);
    }
    return WV_OK;
}

/* Whether what is wanted is there before the end of the file. */
static int has_all(const wv_archive *a)
{
    return a->stage == AT_BODY && a->done == a->tensors && a->layers < a->all_layers;
}

/* Takes one whole box. Its payload may lie in a->packet. */
static wv_status take_box(wv_archive *a, const box *b)
{
    fields body;
    int known = 0;
    size_t size;
    switch (a->stage) {
    case AT_FTYP:
        a->stage = AT_MOOV;
        for (size_t i = 0; i + 4 <= b->size; i += 4)
            known |= i != 4 && !memcmp(b->payload + i, "wvid", 4);
        return memcmp(b->kind, "ftyp", 4) || !known ? WV_NO_ARCHIVE : WV_OK;
    case AT_MOOV:
        a->stage = AT_HEADER;
        return memcmp(b->kind, "moov", 4) ? WV_FORMAT : read_moov(a, b->payload, b->size);
    case AT_HEADER:
        if (b->ours != HEADER)
            return WV_FORMAT;
        RETURN_IF(open_body(a, b, &a->header, 1, &body));
        a->scratch += a->header.room;
        RETURN_IF(read_header(a, body));
        a->stage = AT_BODY;
        return a->stream ? start_all(a) : WV_OK;
    case AT_BODY:
        if (b->ours == FILE_BOX)
            return a->frame ? WV_FORMAT : WV_OK;
        if (b->ours == EXACT) {
            a->exact_seen = 1;
            return take_exact(a, b);
        }
        if (b->ours == FRAME) {
            a->stage = AT_MOOF;
            /* Frames come after exact boxes where a layer ends. */
            a->switches += a->exact_seen;
            a->exact_seen = 0;
            return a->switches < a->all_layers ? take_sidecar(a, b) : WV_FORMAT;
        }
        a->stage = AT_END;
        return b->ours == INDEX ? WV_OK : WV_FORMAT;
    case AT_MOOF: {
        a->stage = AT_MDAT;
        const uint8_t *head = memcmp(b->kind, "moof", 4) ? NULL : child(b->payload, b->size, "mfhd", &size);
        return head && size == 8 && !be32(head) && be32(head + 4) == a->frame + 1 ? WV_OK : WV_FORMAT;
    }
    case AT_MDAT: {
        a->stage = AT_BODY;
        const int right = !memcmp(b->kind, "mdat", 4) && b->size;
        const wv_status status = right ? take_frame(a, b->payload, b->size) : WV_FORMAT;
        a->frame++;
        return status;
    }
    default:
        return WV_OK;
    }
}

/* --- files, in memory or behind a reader ------------------------------------------------------ */

static wv_status box_bytes(const uint8_t *head, size_t *size)
{
    *size = be32(head);
    return *size < 8 || *size > 2 * (size_t)MAX_BODY ? WV_FORMAT : WV_OK;
}

static wv_status read_bytes(const wv_archive *a, uint64_t at, void *to, size_t size)
{
    if (!a->data)
        return size && a->reader.read(a->reader.user, at, to, size) ? WV_READ : WV_OK;
    memcpy(to, a->data + at, size);
    return WV_OK;
}

/* Reads the box at an offset, which moves behind it; from memory the payload stays where it is. */
static wv_status read_box(wv_archive *a, uint64_t *at, box *b)
{
    size_t size;
    if (a->reader.size < *at || a->reader.size - *at < 8)
        return WV_TRUNCATED;
    RETURN_IF(read_bytes(a, *at, a->head, 8));
    if (!*at && memcmp(a->head + 4, "ftyp", 4))
        return WV_NO_ARCHIVE;
    RETURN_IF(box_bytes(a->head, &size));
    *at += 8;
    size -= 8;
    if (size > a->reader.size - *at)
        return WV_TRUNCATED;
    if (!a->data) {
        RETURN_IF(resize(a, &a->packet, 0, size));
        RETURN_IF(read_bytes(a, *at, a->packet.data, size));
    }
    open_box(b, a->head + 4, a->data ? a->data + *at : a->packet.data, size);
    *at += size;
    return WV_OK;
}

static wv_status next_box(wv_archive *a, uint64_t *at)
{
    box b;
    RETURN_IF(read_box(a, at, &b));
    return take_box(a, &b);
}

/* --- the index (section 7) -------------------------------------------------------------------- */

static wv_status load_frame(wv_archive *a, uint64_t at, uint32_t number)
{
    a->frame = number;
    RETURN_IF(next_box(a, &at));
    if (a->stage != AT_MOOF)
        return WV_FORMAT;
    /* Tensors that are read one by one share frames, as long as the file is the same. */
    if (a->shown == number + 1 && !memcmp(a->shown_hash, a->frame_hash, 32)) {
        a->stage = AT_BODY;
        return take_frame(a, NULL, 0);
    }
    RETURN_IF(next_box(a, &at));
    return next_box(a, &at);
}

static wv_status load_box(wv_archive *a, uint64_t at)
{
    a->exact_seen = 0;
    RETURN_IF(next_box(a, &at));
    return a->exact_seen ? WV_OK : WV_FORMAT;
}

/* Walks over the index, and reads what it lists of a tensor. Without one: checks it. */
static wv_status walk_index(wv_archive *a, const tensor *t)
{
    const uint64_t last = a->tensors ? a->tensors - 1 : 0;
    fields lists[4], *frames = lists, *spans = lists + 1, *boxes = lists + 2, *stages = lists + 3;
    memcpy(lists, a->lists, sizeof lists);
    const uint32_t all = entries(frames, MAX_FRAMES);
    uint32_t frames_left = all, boxes_left = entries(boxes, MAX_TENSORS), found = 0, frame = 0;
    uint64_t first[MAX_LAYERS + 1], end[MAX_LAYERS + 1], begin_at = 0, at = a->body;
    for (uint32_t left = entries(spans, MAX_LAYERS * MAX_TENSORS); left && !spans->bad; left--) {
        const uint64_t number = leb(spans, last);
        begin_at += leb(spans, all);
        if (begin_at > all || !a->tensors)
            return WV_LIMIT;
        const uint64_t many = leb(spans, all - begin_at);
        if (!t || number != t->is.number)
            continue;
        if (found > MAX_LAYERS)
            return WV_FORMAT;
        first[found] = begin_at;
        end[found++] = begin_at + many;
    }
    const uint32_t stages_found = stages->at ? entries(stages, MAX_LAYERS) : 1;
    for (uint32_t turn = 0; turn < 2 * stages_found && !stages->bad; turn++) {
        uint32_t *left = turn & 1 ? &boxes_left : &frames_left;
        fields *list = turn & 1 ? boxes : frames;
        uint64_t some = stages->at ? leb(stages, MAX_BODY) : *left;
        for (some = some < *left ? some : *left; some && !list->bad; some--, --*left) {
            const uint64_t bytes = leb(list, (uint64_t)MAX_BODY * (list == frames ? 3 : 2));
            int wanted = 0;
            for (uint32_t i = 0; list == frames && i < found; i++)
                wanted |= first[i] <= frame && frame < end[i];
            for (uint64_t few = list == boxes ? leb(list, MAX_TENSORS) : 0; few && !list->bad; few--)
                wanted |= leb(list, last) == (t ? t->is.number : MAX_TENSORS);
            if (wanted && list == frames)
                RETURN_IF(load_frame(a, at, frame));
            else if (wanted && !a->levels)
                RETURN_IF(load_box(a, at));
            if (t && t->done)
                return WV_OK;
            frame += list == frames;
            at += bytes;
        }
    }
    for (int i = 0; i < 4; i++)
        RETURN_IF(ends(lists + i));
    return frames_left || boxes_left ? WV_FORMAT : WV_OK;
}

/* Finds the index; a file without one is cut short, and can be read front to back alone. */
static wv_status read_index(wv_archive *a)
{
    uint8_t tail[16];
    box b;
    fields body, found[R_ROOT - R_FRAMES + 1] = {{0}};
    const uint64_t size = a->reader.size;
    if (size < a->body + 20)
        return WV_OK;
    RETURN_IF(read_bytes(a, size - 16, tail, 16));
    const uint32_t mfra = be32(tail + 12);
    if (memcmp(tail + 4, "mfro", 4) || mfra > size - a->body - 4)
        return WV_OK;
    uint64_t at = size - mfra;
    RETURN_IF(read_bytes(a, at - 4, tail, 4));
    if (le32(tail) > at - a->body)
        return WV_OK;
    at -= le32(tail);
    const wv_status status = read_box(a, &at, &b);
    if (status == WV_READ || status == WV_MEMORY)
        return status;
    if (status || b.ours != INDEX || b.size < 4)
        return WV_OK;
    b.size -= 4;
    RETURN_IF(open_body(a, &b, &a->index, 1, &body));
    a->scratch += a->index.room;
    RETURN_IF(collect(body, R_FRAMES, 0x255, found));
    for (int i = 0; i < 4; i++)
        a->lists[i] = found[2 * i];
    fields *root = found + (R_ROOT - R_FRAMES);
    a->root = root->at ? take(root, 32) : NULL;
    RETURN_IF(ends(root));
    return walk_index(a, NULL);
}

/* --- the interface ---------------------------------------------------------------------------- */

static wv_status hevc_open(void *user, const char entry[4], const uint8_t *config, size_t size,
                           uint32_t width, uint32_t height)
{
    wv_archive *a = user;
    const size_t samples = (size_t)width * height, memory = wv_hevc_memory(width, height);
    if (memcmp(entry, "hvc1", 4))
        return WV_CODEC;
    a->luma = take_memory(&a->memory, samples + memory);
    if (!a->luma)
        return WV_MEMORY;
    a->scratch += samples + memory;
    a->hevc = wv_hevc_open(config, size, width, height, a->luma + samples, memory);
    return a->hevc ? WV_OK : WV_CODEC;
}

static wv_status hevc_decode(void *user, const uint8_t *packet, size_t bytes, const uint8_t **luma,
                             size_t *stride)
{
    wv_archive *a = user;
    *luma = a->luma;
    *stride = a->width;
    return wv_hevc_decode(a->hevc, packet, bytes, a->luma, a->width) ? WV_CODEC : WV_OK;
}

static wv_status make(wv_archive **made, int right, const wv_options *options)
{
    const wv_options standard = {{NULL, NULL, NULL}, NULL, WV_CHECK_FRAMES};
    const wv_options *chosen = options ? options : &standard;
    if (made)
        *made = NULL;
    if (!made || !right)
        return WV_ARGUMENT;
    wv_archive *a = *made = take_memory(&chosen->allocator, sizeof *a);
    if (!a)
        return WV_MEMORY;
    memset(a, 0, sizeof *a);
    a->memory = chosen->allocator;
    a->checks = chosen->checks;
    a->layers = MAX_LAYERS;
    a->scratch = sizeof *a;
    a->decoder = chosen->decoder ? *chosen->decoder : (wv_decoder){a, hevc_open, hevc_decode, NULL};
    return WV_OK;
}

static wv_status open_file(wv_archive **archive, const void *data, const wv_reader *reader,
                           const wv_options *options)
{
    RETURN_IF(make(archive, data || (reader && reader->read), options));
    wv_archive *a = *archive;
    wv_status status = WV_OK;
    a->data = data;
    a->reader = *reader;
    for (int i = 0; i < 3 && !status; i++)
        status = next_box(a, &a->body);
    status = status ? status : read_index(a);
    if (status) {
        wv_close(a);
        *archive = NULL;
    }
    return status;
}

wv_status wv_open_memory(wv_archive **archive, const void *data, size_t size, const wv_options *options)
{
    const wv_reader whole = {NULL, size, NULL};
    return open_file(archive, data, &whole, options);
}

wv_status wv_open_reader(wv_archive **archive, const wv_reader *reader, const wv_options *options)
{
    return open_file(archive, NULL, reader, options);
}

/* Whether a sink is complete, and its type one of those of weightvid.h. */
static int is_right(const wv_sink *sink)
{
    return sink && sink->begin && sink->end
        && (sink->type == WV_STORED || sink->type == WV_F32 || sink->type == WV_F16);
}

wv_status wv_open_stream(wv_archive **archive, const wv_sink *sink, const wv_options *options)
{
    RETURN_IF(make(archive, is_right(sink), options));
    (*archive)->sink = sink;
    (*archive)->stream = 1;
    return WV_OK;
}

/* Whether it can be used now: it is no stream, or one that has not begun, and in no other call. */
static int is_ready(const wv_archive *a)
{
    return a && (a->stream ? !a->stage && !a->box_have : a->reader.size && !a->sink);
}

wv_status wv_use_base(wv_archive *a, wv_archive *base)
{
    if (!is_ready(a) || !is_ready(base) || base->stream || base == a)
        return WV_ARGUMENT;
    a->base = base;
    const wv_status status = a->stream ? WV_OK : check_base(a);
    if (status)
        a->base = NULL;
    return status;
}

wv_status wv_use_layers(wv_archive *a, uint32_t layers)
{
    if (!is_ready(a) || !layers)
        return WV_ARGUMENT;
    a->layers = layers < MAX_LAYERS ? layers : MAX_LAYERS;
    return WV_OK;
}

wv_status wv_push(wv_archive *a, const void *data, size_t size)
{
    const uint8_t *from = data;
    if (!a || !a->stream || (size && !data))
        return WV_ARGUMENT;
    while (size && !a->failed && a->stage != AT_END) {
        const size_t whole = a->box_have < 8 ? 8 : a->box_size, left = whole - a->box_have;
        const size_t some = left < size ? left : size, have = a->box_have + some;
        /* A box that claims more than a picture has takes no more memory than twice what has come. */
        if (!a->box_have || have > a->packet.room) {
            const size_t picture_size = (size_t)a->width * a->height + 65536;
            const size_t most = picture_size < 2 * have ? 2 * have : picture_size;
            a->failed = resize(a, &a->packet, a->box_have, whole < most ? whole : most);
            if (a->failed)
                break;
        }
        uint8_t *head = a->packet.data;
        memcpy(head + a->box_have, from, some);
        a->box_have = have;
        from += some;
        size -= some;
        if (have == 8)
            a->failed = a->stage == AT_FTYP && memcmp(head + 4, "ftyp", 4)
                ? WV_NO_ARCHIVE : box_bytes(head, &a->box_size);
        if (have >= 8 && have == a->box_size && !a->failed) {
            box b;
            open_box(&b, head + 4, head + 8, have - 8);
            a->box_have = 0;
            a->failed = take_box(a, &b);
            if (has_all(a))
                a->stage = AT_END;
        }
    }
    return a->failed;
}

/* Ends reading front to back: what was begun and is not there is told. */
static wv_status end_all(wv_archive *a, wv_status status)
{
    if (!status && a->stage != AT_END && !has_all(a))
        status = WV_TRUNCATED;
    else if (!status && a->done < a->tensors)
        status = WV_FORMAT;
    for (uint32_t i = 0; a->all && i < a->tensors; i++) {
        tensor *t = a->all + i;
        if (t->work)
            finish_tensor(a, t, status == WV_TRUNCATED && t->layer ? WV_COARSE : status);
    }
    drop_part(a);
    return status;
}

wv_status wv_finish(wv_archive *a)
{
    if (!a || !a->stream)
        return WV_ARGUMENT;
    a->stream = 0;
    return end_all(a, a->failed);
}

void wv_close(wv_archive *a)
{
    if (!a)
        return;
    if (a->stream)
        wv_finish(a);
    if (a->decoder_open && a->decoder.close)
        a->decoder.close(a->decoder.user);
    void *all[] = {a->all, a->header.data, a->index.data, a->packet.data, a->sidecar.data, a->kept, a->luma};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        give_memory(a, all[i]);
    give_memory(a, a);
}

uint32_t wv_count(const wv_archive *a)
{
    return a && a->stage >= AT_BODY ? a->names : 0;
}

const wv_tensor *wv_get(const wv_archive *a, uint32_t place)
{
    return place < wv_count(a) ? &a->all[place].is : NULL;
}

const wv_tensor *wv_find(const wv_archive *a, const char *name)
{
    if (!wv_count(a) || !name)
        return NULL;
    uint32_t found = *slot_of(a, name, strlen(name));
    return found ? &a->all[found - 1].is : NULL;
}

wv_status wv_metadata(const wv_archive *a, uint32_t place, const char **key, const char **value)
{
    if (!a || !key || !value)
        return WV_ARGUMENT;
    if (a->stage < AT_BODY || place >= a->found_pairs)
        return WV_NOT_FOUND;
    *key = a->pairs[2 * place];
    *value = a->pairs[2 * place + 1];
    return WV_OK;
}

wv_status wv_file(const wv_archive *a, uint32_t place, const char **path, uint64_t *bytes)
{
    if (!a || !path || !bytes)
        return WV_ARGUMENT;
    if (a->stage < AT_BODY || place >= a->found_files)
        return WV_NOT_FOUND;
    *path = a->files[place].path;
    *bytes = a->files[place].bytes;
    return WV_OK;
}

wv_status wv_read_file(wv_archive *a, uint32_t place, void *out, size_t bytes)
{
    box b;
    fields body;
    if (!a || a->stage < AT_BODY || place >= a->found_files)
        return WV_NOT_FOUND;
    if (!out || bytes != a->files[place].bytes || !is_ready(a) || a->stream)
        return WV_ARGUMENT;
    uint64_t at = a->files[place].offset;
    buffer room = {out, bytes};
    RETURN_IF(read_box(a, &at, &b));
    if (b.ours != FILE_BOX || b.size < 9 || le32(b.payload + 5) != bytes)
        return WV_FORMAT;
    return open_body(a, &b, &room, 1, &body);
}

size_t wv_scratch_bytes(const wv_archive *a)
{
    return a ? a->scratch : 0;
}

uint32_t wv_layers(const wv_archive *a, uint32_t *arrived)
{
    uint32_t unused;
    arrived = arrived ? arrived : &unused;
    *arrived = 0;
    if (!a || a->stage < AT_BODY)
        return 0;
    *arrived = a->layers < a->all_layers ? a->layers : a->all_layers;
    for (uint32_t i = 0; i < a->tensors; i++) {
        uint32_t missing = mask_of(a, a->all + i) >> 1;
        for (uint32_t n = 0; n < a->all[i].layer; n++)
            missing &= missing - 1;
        while (missing & ((1u << *arrived) - 1))
            --*arrived;
    }
    return a->all_layers;
}

/* Reads boxes front to back, as far as there is something that is wanted. */
static wv_status read_all(wv_archive *a)
{
    wv_status status = start_all(a);
    uint64_t at = a->body;
    while (!status && a->stage != AT_END && !has_all(a))
        status = next_box(a, &at);
    return status;
}

static wv_status load_one(wv_archive *a, const wv_tensor *wanted, wv_dtype type, void *out)
{
    const wv_sink sink = {out ? out : a, type, NULL, NULL}; /* the room itself: none is written to `a` */
    if (!a->index.data)
        return WV_TRUNCATED;
    tensor *t = a->only = a->all + wanted->number;
    a->sink = &sink;
    wv_status status = start_all(a);
    if (!status && !t->done)
        status = walk_index(a, t);
    if (!status && a->levels && !t->work)
        status = WV_LEVELS;
    else if (!status && (a->levels ? t->work->have != t->is.elements : !t->done))
        status = WV_FORMAT;
    if (!t->done)
        finish_tensor(a, t, status);
    drop_part(a);
    a->only = NULL;
    a->sink = NULL;
    return status;
}

/* Whether a tensor can be read now, and is of this archive. */
static int is_own(const wv_archive *a, const wv_tensor *t)
{
    return t && is_ready(a) && !a->stream
        && t == wv_get(a, (uint32_t)(((uintptr_t)t - (uintptr_t)a->all) / sizeof *a->all));
}

wv_status wv_load(wv_archive *a, const wv_tensor *wanted, wv_dtype type, void *out, size_t bytes)
{
    if (!is_own(a, wanted) || (!out && bytes) || !size_as(wanted, type)
        || bytes != wanted->elements * size_as(wanted, type))
        return WV_ARGUMENT;
    return load_one(a, wanted, type, out);
}

wv_status wv_levels(wv_archive *a, const wv_tensor *wanted, int32_t *out, size_t bytes, float *step)
{
    if (!is_own(a, wanted) || !out || !step || bytes != 4 * wanted->elements)
        return WV_ARGUMENT;
    if (wanted->dtype > WV_BF16 || a->all[wanted->number].mask != 2)
        return WV_LEVELS;
    a->levels = 1;
    wv_status status = load_one(a, wanted, WV_STORED, out);
    a->levels = 0;
    *step = a->levels_step;
    return status;
}

wv_status wv_load_all(wv_archive *a, const wv_sink *sink)
{
    if (!is_ready(a) || a->stream || !is_right(sink))
        return WV_ARGUMENT;
    a->sink = sink;
    wv_status status = end_all(a, read_all(a));
    a->stage = AT_BODY;
    a->sink = NULL;
    return status;
}

const char *wv_status_text(wv_status status)
{
    const char *text =
        "done\0wrong argument\0out of memory\0reading failed\0not found\0the file ends early\0"
        "no weightvid archive\0needs a newer reader\0a number above its limit\0malformed\0"
        "damaged: a hash does not match\0the decoder refused it\0no integers: pack with --integer\0"
        "not the base that the update names, or none\0lower layers only: the file ends early\0";
    for (unsigned i = 0; i < (unsigned)status && *text; i++)
        text += strlen(text) + 1;
    return *text ? text : "unknown status";
}
