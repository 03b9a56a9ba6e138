/* The reader of weightvid archives; FORMAT.md, whose sections are named below, is the text to it. */
#include "weightvid.h"

#include <stdlib.h>
#include <string.h>

#ifndef WEIGHTVID_NO_HEVC
#include "hevc.h"
#endif

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
       MAX_NAME = 4096, MAX_AXES = 32, MAX_GAIN = 32767, MAX_LAYERS = 16 };
enum { R_TENSORS = 2, R_ALIASES = 4, R_METADATA = 6, R_FILES = 8, R_BASES = 10, R_LAYERS = 12,
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
    uint32_t w[16], s[8];
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i++) {
#define TURN(x, n) ((x) >> (n) | (x) << (32 - (n)))
        if (i < 16) {
            w[i] = be32(block + 4 * i);
        } else {
            uint32_t a = w[(i + 1) & 15], b = w[(i + 14) & 15];
            w[i & 15] += (TURN(a, 7) ^ TURN(a, 18) ^ a >> 3) + w[(i + 9) & 15]
                       + (TURN(b, 17) ^ TURN(b, 19) ^ b >> 10);
        }
        uint32_t t1 = s[7] + (TURN(s[4], 6) ^ TURN(s[4], 11) ^ TURN(s[4], 25))
                    + (s[6] ^ (s[4] & (s[5] ^ s[6]))) + k[i] + w[i & 15];
        uint32_t t2 = (TURN(s[0], 2) ^ TURN(s[0], 13) ^ TURN(s[0], 22))
                    + ((s[0] & s[1]) | (s[2] & (s[0] | s[1])));
#undef TURN
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += t1;
        s[0] = t1 + t2;
    }
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
    while (size) {
        size_t have = sha->bytes & 63, some = 64 - have < size ? 64 - have : size;
        if (some == 64) {
            sha_block(sha->state, data);
        } else {
            memcpy(sha->block + have, data, some);
            if (have + some == 64)
                sha_block(sha->state, sha->block);
        }
        sha->bytes += some;
        data += some;
        size -= some;
    }
}

/* Whether the hash begins with so many expected bytes. */
static int sha_is(sha256 *sha, const uint8_t *expected, size_t count)
{
    static const uint8_t one = 0x80, zero = 0;
    uint8_t length[8], differs = 0;
    uint64_t bits = 8 * sha->bytes;
    for (int i = 0; i < 8; i++)
        length[i] = (uint8_t)(bits >> (56 - 8 * i));
    sha_add(sha, &one, 1);
    while ((sha->bytes & 63) != 56)
        sha_add(sha, &zero, 1);
    sha_add(sha, length, 8);
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
    return room && symbols - made->count[0] > 1 ? -1 : 0;
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
    if (fixed) {
        memset(lengths, 8, 144);
        memset(lengths + 144, 9, 112);
        memset(lengths + 256, 7, 24);
        memset(lengths + 280, 8, 8);
        memset(lengths + 288, 5, 30);
    } else {
        literal = (int)bits_from(z, 5) + 257;
        distance = (int)bits_from(z, 5) + 1;
        int few = (int)bits_from(z, 4) + 4;
        for (int i = 0; i < few; i++)
            lengths[order[i]] = (uint8_t)bits_from(z, 3);
        if (literal > 286 || distance > 30 || make_code(literals, lengths, 19))
            z->bad = 1;
        memset(lengths, 0, sizeof lengths);
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
    if (z->bad || make_code(literals, lengths, literal)
        || (make_code(distances, lengths + literal, distance) && !fixed))
        z->bad = 1;
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
            if (z.end - z.in < 4)
                return -1;
            size_t some = (size_t)z.in[0] | (size_t)z.in[1] << 8;
            size_t check = (size_t)z.in[2] | (size_t)z.in[3] << 8;
            z.in += 4;
            if ((some ^ check) != 0xFFFF || some > (size_t)(z.end - z.in) || some > room - have)
                return -1;
            memcpy(out + have, z.in, some);
            z.in += some;
            have += some;
            continue;
        }
        if (kind == 3)
            return -1;
        read_codes(&z, kind == 1, &literals, &distances);
        while (!z.bad) {
            int symbol = symbol_from(&z, &literals);
            if (symbol < 256) {
                if (z.bad || have == room)
                    return -1;
                out[have++] = (uint8_t)symbol;
                continue;
            }
            if (symbol == 256)
                break;
            /* Lengths and distances: 8 and 4 codes without extra bits, then 4 and 2 to a bit. */
            int place = symbol - 257;
            int extra = place < 8 || place == 28 ? 0 : place / 4 - 1;
            size_t length = place < 8 ? (size_t)place + 3
                          : place == 28 ? 258 : ((size_t)(4 + place % 4) << extra) + 3;
            length += bits_from(&z, extra);
            int far = symbol_from(&z, &distances), more = far < 4 ? 0 : far / 2 - 1;
            size_t distance = far < 4 ? (size_t)far + 1 : ((size_t)(2 + far % 2) << more) + 1;
            distance += bits_from(&z, more);
            if (z.bad || place > 28 || far > 29 || distance > have || length > room - have)
                return -1;
            for (; length; length--, have++)
                out[have] = out[have - distance];
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

typedef struct tensor {
    wv_tensor is;
    uint8_t *room;       /* to be filled; NULL: not begun, or skipped */
    uint8_t *into;       /* where layers are summed: the room, or memory of our own */
    uint64_t have;       /* elements of the layer that are there */
    sha256 *sha;         /* of a quantized layer that is checked */
    uint32_t mask;       /* section 3.1 */
    uint8_t layer, left; /* layers that are there, and to come */
    uint8_t begun;       /* what the layer that has begun is: a NOTHING, PARTS, ITEMS */
    uint8_t added, done;
} tensor;

enum { NOTHING, PARTS, ITEMS };

typedef struct side_file {
    const char *path;
    uint64_t offset;
    uint32_t bytes;
} side_file;

/* Escapes of a part that are to come. */
typedef struct escapes {
    fields gaps, numbers;
    uint32_t left;
    uint64_t next; /* place */
} escapes;

/* A part (section 4) and the state of its arrival. */
typedef struct part {
    uint8_t *memory, *record; /* tables; copy of its record if it goes on in the next frame */
    tensor *of;
    uint64_t first;           /* element */
    uint32_t column, rows, columns, channels, kernel, size, have;
    uint32_t axes, bases[4];
    uint8_t method, shift;
    float step;
    const uint8_t *frequency_steps, *row_steps, *energies;
    escapes escapes;
    uint8_t *levels;          /* row by row: at the end of the part's room, or behind the tables */
    uint32_t *row_order, *column_order, row_start[MAX_ENERGY + 2], column_start[2 * MAX_ENERGY + 2];
    int class_, row_energy;   /* rectangle being filled, and the place in it */
    uint32_t row, at_column;
} part;

enum { AT_FTYP, AT_MOOV, AT_HEADER, AT_BODY, AT_MOOF, AT_MDAT, AT_END };

typedef struct buffer {
    uint8_t *data;
    size_t room;
} buffer;

struct wv_archive {
    wv_allocator memory;
    wv_decoder decoder;
    wv_checks checks;
    wv_reader reader;
    const uint8_t *data;     /* all of the file, if it is in memory */
    int stage, decoder_open, stream;
    uint32_t width, height;
    uint32_t tensors, names, found_files, found_pairs, found_bases, frame;
    uint32_t shown;          /* number of the frame that the built-in decoder shows, and 1 */
    tensor *all;             /* tensors, then aliases */
    uint32_t *table, table_size; /* of names: place + 1, by hash */
    uint8_t *header, *index; /* bodies */
    uint64_t *shapes;
    char *texts;
    side_file *files;
    const char **pairs;
    const uint8_t **bases;   /* K first */
    wv_archive *base;        /* what an update adds to, and its root in the header */
    const uint8_t *base_root, *root;
    uint32_t layers, all_layers, switches; /* read, of all; times that frames came after exact boxes */
    uint64_t body;
    fields lists[4];         /* of the index: frames, spans, boxes, stages */
    buffer packet, sidecar;
    fields sidecar_body;
    part *open;
    const wv_sink *sink;
    tensor *only;
    wv_dtype only_type;
    int levels;              /* the wanted tensor is wanted as integers */
    float levels_step;
    size_t scratch;
    uint8_t head[8];         /* of a stream's box */
    uint32_t head_have;
    size_t box_have, box_size;
    wv_status failed;
    int exact_seen;
    uint32_t missing;        /* the first tensor that is not done */
    uint8_t *luma;           /* of the built-in decoder */
    void *hevc, *hevc_memory;
};

static void *take_memory(wv_archive *a, size_t bytes)
{
    return a->memory.alloc(a->memory.user, bytes ? bytes : 1);
}

static void give_memory(wv_archive *a, void *memory)
{
    if (memory)
        a->memory.free(a->memory.user, memory);
}

static wv_status grow(wv_archive *a, buffer *b, size_t bytes)
{
    if (b->room >= bytes)
        return WV_OK;
    give_memory(a, b->data);
    b->room = 0;
    b->data = take_memory(a, bytes);
    if (!b->data)
        return WV_MEMORY;
    b->room = bytes;
    return WV_OK;
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
    uint64_t value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
        uint64_t byte = *take(f, 1);
        uint64_t low = byte & 0x7F;
        value = shift > 56 && low ? ~(uint64_t)0 : value | low << (shift > 56 ? 0 : shift);
        if (f->bad)
            return 0;
        if (byte < 0x80) {
            if (value <= limit)
                return value;
            f->bad = WV_LIMIT;
            return 0;
        }
    }
    f->bad = WV_FORMAT;
    return 0;
}

static fields sub(fields *f, uint64_t limit)
{
    uint64_t size = leb(f, limit);
    const uint8_t *data = take(f, size);
    fields made = {data, data, f->bad};
    if (!f->bad)
        made.end = data + size;
    return made;
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

/* The next record; data of unknown types are refused or skipped by their parity (section 2). */
static int record(fields *body, uint64_t *type, fields *data)
{
    if (body->bad || body->at == body->end)
        return 0;
    *type = leb(body, (uint64_t)1 << 32);
    *data = sub(body, MAX_BODY);
    return !body->bad;
}

static wv_status unknown(uint64_t type)
{
    return type & 1 ? WV_OK : WV_VERSION;
}

/* Body of a box of ours (section 2). A deflated one goes to *room, which grows; so does one that is
   kept, as the box goes. */
static wv_status open_body(wv_archive *a, const uint8_t *payload, size_t size, buffer *room, int keep,
                           fields *body)
{
    if (size < 9 || !MATCHES(crc32_of(payload + 4, size - 4) == le32(payload)))
        return WV_DIGEST;
    uint32_t bytes = le32(payload + 5);
    if (payload[4] > 1 || bytes > MAX_BODY)
        return WV_LIMIT;
    body->at = payload + 9;
    body->bad = WV_OK;
    if (payload[4] == 1) {
        if (bytes / 1032 > size) /* deflate makes no more of a byte */
            return WV_FORMAT;
        RETURN_IF(grow(a, room, bytes));
        if (inflate(payload + 9, size - 9, room->data, bytes))
            return WV_FORMAT;
        body->at = room->data;
    } else if (bytes != size - 9) {
        return WV_FORMAT;
    } else if (keep) {
        RETURN_IF(grow(a, room, bytes));
        if (bytes)
            memcpy(room->data, body->at, bytes);
        body->at = room->data;
    }
    body->end = body->at + bytes;
    return WV_OK;
}

/* --- header and track (sections 3 and 8) ------------------------------------------------------ */

static uint32_t hash_of(const char *name, size_t bytes)
{
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ (uint8_t)name[i]) * 16777619u;
    return hash ^ hash >> 15;
}

/* Place of a name in the table: that of an equal one, or an empty one. */
static uint32_t *slot_of(const wv_archive *a, const char *name, size_t bytes)
{
    uint32_t at = hash_of(name, bytes);
    for (;; at++) {
        uint32_t *slot = a->table + (at & (a->table_size - 1));
        const wv_tensor *t = *slot ? &a->all[*slot - 1].is : NULL;
        if (!t || (t->name_bytes == bytes && !memcmp(t->name, name, bytes)))
            return slot;
    }
}

static const char *copy_text(char **to, const fields *from)
{
    const char *made = *to;
    size_t bytes = (size_t)(from->end - from->at);
    memcpy(*to, from->at, bytes);
    (*to)[bytes] = 0;
    *to += bytes + 1;
    return made;
}

static wv_status add_name(wv_archive *a, uint32_t place)
{
    uint32_t *slot = slot_of(a, a->all[place].is.name, a->all[place].is.name_bytes);
    if (*slot)
        return WV_FORMAT;
    *slot = place + 1;
    return WV_OK;
}

static wv_status read_tensors(wv_archive *a, fields f, char **texts, uint64_t *shapes)
{
    leb(&f, MAX_TENSORS);
    for (uint32_t i = 0; i < a->tensors; i++) {
        wv_tensor *t = &a->all[i].is;
        fields name = text(&f, MAX_NAME);
        t->dtype = (wv_dtype)leb(&f, WV_BOOL);
        t->axes = (uint32_t)leb(&f, MAX_AXES);
        t->number = i;
        t->elements = 1;
        t->shape = shapes;
        uint64_t product = 1;
        for (uint32_t axis = 0; axis < t->axes; axis++) {
            uint64_t size = *shapes++ = leb(&f, MAX_ELEMENTS);
            t->elements *= size; /* 0, or checked below */
            if (size > MAX_ELEMENTS / product)
                return WV_LIMIT;
            product *= size ? size : 1;
        }
        if (f.bad)
            return f.bad;
        t->name_bytes = (size_t)(name.end - name.at);
        t->name = copy_text(texts, &name);
        RETURN_IF(add_name(a, i));
    }
    return ends(&f);
}

static wv_status read_aliases(wv_archive *a, fields f, char **texts)
{
    leb(&f, MAX_TENSORS);
    for (uint32_t i = a->tensors; i < a->names; i++) {
        fields name = text(&f, MAX_NAME);
        uint64_t number = leb(&f, a->tensors - 1);
        if (f.bad)
            return f.bad;
        a->all[i].is = a->all[number].is;
        a->all[i].is.alias = 1;
        a->all[i].is.name_bytes = (size_t)(name.end - name.at);
        a->all[i].is.name = copy_text(texts, &name);
        RETURN_IF(add_name(a, i));
    }
    return ends(&f);
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

static wv_status read_header(wv_archive *a, fields body)
{
    fields kinds[7] = {{0}}, data;
    uint64_t type, counts[7] = {0}, axes = 0;
    while (record(&body, &type, &data)) {
        if (type > R_LAYERS || type < R_TENSORS || type & 1) {
            RETURN_IF(unknown(type));
            continue;
        }
        fields *kind = kinds + type / 2;
        if (kind->at)
            return WV_FORMAT;
        *kind = data;
        counts[type / 2] = leb(&data, type == R_BASES ? 256 : type == R_FILES ? 4096 : MAX_TENSORS);
        /* An entry takes two bytes or more. */
        if (data.bad || counts[type / 2] > (uint64_t)(data.end - data.at))
            return data.bad ? data.bad : WV_FORMAT;
        if (type == R_TENSORS)
            for (uint64_t i = 0; i < counts[1] && !data.bad; i++) {
                sub(&data, MAX_NAME);
                leb(&data, WV_BOOL);
                uint64_t few = leb(&data, MAX_AXES);
                for (uint64_t axis = 0; axis < few; axis++)
                    leb(&data, MAX_ELEMENTS);
                axes += few;
            }
        if (data.bad)
            return data.bad;
    }
    if (body.bad || !kinds[1].at)
        return body.bad ? body.bad : WV_FORMAT;
    a->tensors = (uint32_t)counts[1];
    a->names = (uint32_t)(counts[1] + counts[2]);
    a->found_pairs = (uint32_t)counts[3];
    a->found_files = (uint32_t)counts[4];
    a->found_bases = (uint32_t)counts[5];
    if (counts[2] && !a->tensors)
        return WV_LIMIT;
    for (a->table_size = 2; a->table_size < 2 * a->names;)
        a->table_size *= 2;
    /* A copied text takes no more than it does here, with its length. */
    size_t text_bytes = (size_t)(body.end - a->header) + 2 * a->found_pairs + a->names;
    size_t sizes[7] = {a->names * sizeof *a->all, a->table_size * sizeof *a->table, (size_t)axes * 8,
                       text_bytes, a->found_pairs * 2 * sizeof *a->pairs,
                       a->found_files * sizeof *a->files, a->found_bases * sizeof *a->bases};
    void *rooms[7];
    int failed = 0;
    for (int i = 0; i < 7; i++) {
        rooms[i] = take_memory(a, sizes[i]);
        a->scratch += sizes[i];
        failed |= !rooms[i];
        if (rooms[i])
            memset(rooms[i], 0, sizes[i]);
    }
    a->all = rooms[0];
    a->table = rooms[1];
    a->shapes = rooms[2];
    a->texts = rooms[3];
    a->pairs = rooms[4];
    a->files = rooms[5];
    a->bases = rooms[6];
    if (failed) {
        a->tensors = 0; /* there are none to end */
        return WV_MEMORY;
    }
    char *texts = a->texts;
    RETURN_IF(read_tensors(a, kinds[1], &texts, a->shapes));
    if (kinds[2].at)
        RETURN_IF(read_aliases(a, kinds[2], &texts));
    leb(&kinds[3], MAX_TENSORS);
    for (uint32_t i = 0; i < 2 * a->found_pairs; i++) {
        fields found = text(&kinds[3], MAX_BODY);
        if (kinds[3].bad)
            return kinds[3].bad;
        a->pairs[i] = copy_text(&texts, &found);
    }
    leb(&kinds[4], 4096);
    for (uint32_t i = 0; i < a->found_files; i++) {
        fields path = text(&kinds[4], 1024);
        text(&kinds[4], 64);
        a->files[i].bytes = (uint32_t)leb(&kinds[4], MAX_BODY);
        a->files[i].offset = a->body;
        a->body += leb(&kinds[4], MAX_BODY);
        if (kinds[4].bad)
            return kinds[4].bad;
        a->files[i].path = copy_text(&texts, &path);
    }
    leb(&kinds[5], 256);
    for (uint32_t i = 0; i < a->found_bases; i++) {
        a->bases[i] = kinds[5].at;
        uint64_t size = leb(&kinds[5], MAX_KERNEL);
        take(&kinds[5], 4 * size * size);
    }
    a->all_layers = kinds[6].at ? (uint32_t)leb(&kinds[6], MAX_LAYERS) : 1;
    fields root = kinds[6].at ? sub(&kinds[6], 32) : kinds[6];
    a->base_root = root.at == root.end ? NULL : root.at;
    for (uint32_t i = 0; i < a->tensors; i++) {
        uint32_t mask = kinds[6].at ? (uint32_t)leb(&kinds[6], (2u << a->all_layers) - 1) : 2;
        if (!mask || (mask & 1 && !a->base_root))
            kinds[6].bad = kinds[6].bad ? kinds[6].bad : WV_FORMAT;
        a->all[i].mask = mask;
    }
    if (!a->all_layers || (a->base_root && root.end - root.at != 32))
        return kinds[6].bad ? kinds[6].bad : WV_FORMAT;
    for (int i = 3; i < 7; i++)
        if (kinds[i].at)
            RETURN_IF(ends(&kinds[i]));
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
    uint32_t low = a->width < a->height ? a->width : a->height;
    uint32_t high = a->width < a->height ? a->height : a->width;
    if (low < 192 || high > 2176 || a->width * a->height > MAX_SAMPLES || a->width % 64 || a->height % 64)
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

static float quarter_octaves(uint8_t octet)
{
    static const uint32_t q[4] = {0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD};
    int t = octet < 128 ? octet : octet - 256;
    int octaves = (t + 128) / 4 - 32;
    return float_of(q[t & 3] + (uint32_t)octaves * 0x800000u);
}

static uint16_t half_of(float value)
{
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, low = bits & 0x7FFFFFFF;
    if (low > 0x7F800000) /* NaN: its upper bits, and one that says NaN */
        return (uint16_t)(sign | 0x7C00 | (low >> 13 & 0x3FF) | ((low >> 13 & 0x3FF) ? 0 : 0x200));
    if (low >= 0x477FF000)
        return (uint16_t)(sign | 0x7C00);
    if (low < 0x38800000) { /* subnormal: 2^-24 is 1 */
        float scaled = float_of(low) * 16777216.0f;
        uint32_t whole = (uint32_t)scaled;
        float rest = scaled - (float)whole;
        return (uint16_t)(sign | (whole + (rest > 0.5f || (rest == 0.5f && (whole & 1)))));
    }
    return (uint16_t)(sign | (((low + 0xFFF + (low >> 13 & 1)) >> 13) - 0x1C000));
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
    if (as != t->is.dtype)
        bits = bits_from_float(as, float_from(t->is.dtype, bits));
    put_bits(as, size_of(as), bits, to);
}

/* Writes a row of weights: added to what is there, rounded to the tensor's type, and hashed. */
static void put_row(const tensor *t, wv_dtype as, float *row, uint32_t count, uint8_t *to)
{
    const wv_dtype type = t->is.dtype;
    const uint32_t size = size_of(type), wide = size_of(as);
    if (type == WV_F32 && as == WV_F32 && !byte_at(type, 4, 0)) {
        for (uint32_t i = 0; t->added && i < count; i++) {
            float below;
            memcpy(&below, to + 4 * (size_t)i, 4);
            row[i] = row[i] + below;
        }
        memcpy(to, row, 4 * (size_t)count);
        if (t->sha)
            sha_add(t->sha, to, 4 * (size_t)count);
        return;
    }
    for (uint32_t i = 0; i < count; i++, to += wide) {
        uint8_t element[8];
        float value = row[i];
        if (t->added)
            value = value + float_from(type, get_bits(type, size, to));
        uint64_t bits = bits_from_float(type, value);
        for (uint32_t byte = 0; byte < size; byte++)
            element[byte] = (uint8_t)(bits >> 8 * byte);
        if (t->sha)
            sha_add(t->sha, element, size);
        put_element(t, as, bits, to);
    }
}

/* Type in which a tensor's elements lie while it is read: layers are added in its own. */
static wv_dtype type_of(const wv_archive *a, const tensor *t)
{
    const wv_dtype wanted = a->only ? a->only_type : a->sink->type;
    return t->into != t->room || !size_as(&t->is, wanted) || wanted == WV_STORED ? t->is.dtype : wanted;
}

/* The kernel matrix M (section 5.4): what a level of frequency f adds to position i. Two positions
   share a number, low + 2^32 high: one multiplication and one addition do both. */
static wv_status kernel_matrix(const wv_archive *a, const part *p, int64_t *matrix)
{
    const float scale = (float)(1u << p->shift);
    const uint32_t pairs = (p->kernel + 1) / 2;
    for (uint32_t i = 0; i < p->kernel; i++) {
        int32_t sum = 0;
        for (uint32_t f = 0; f < p->kernel; f++) {
            uint32_t block = p->kernel, u = f, v = i;
            float product = 1;
            for (uint32_t axis = 0; axis < p->axes; axis++) {
                fields basis = {a->bases[p->bases[axis]], NULL, WV_OK};
                basis.end = basis.at + 10;
                uint32_t size = (uint32_t)leb(&basis, MAX_KERNEL);
                block /= size;
                product = product * float_of(le32(basis.at + 4 * (u / block * size + v / block)));
                u %= block;
                v %= block;
            }
            if (p->frequency_steps)
                product = product * quarter_octaves(p->frequency_steps[f]);
            product = product * scale;
            if (!(product > -MAX_GAIN - 1 && product < MAX_GAIN + 1))
                return WV_LIMIT;
            /* To the nearest integer, ties to even, as additions round. */
            volatile float rounded = product + 12582912.0f;
            int32_t m = (int32_t)(rounded - 12582912.0f);
            int64_t *to = matrix + (size_t)f * pairs + i / 2;
            *to = i & 1 ? *to + m * ((int64_t)1 << 32) : m;
            sum += m < 0 ? -m : m;
            if (sum > MAX_GAIN)
                return WV_LIMIT;
        }
    }
    return WV_OK;
}

/* Number i of pairs. */
static int32_t of_pair(const int64_t *pairs, uint32_t i)
{
    const int64_t both = pairs[i / 2];
    const int32_t low = (int32_t)(uint32_t)both;
    return i & 1 ? (int32_t)((both - low) / ((int64_t)1 << 32)) : low;
}

/* The next escape (section 5.2) before a place of the part. */
static int next_escape(escapes *e, uint64_t end, uint64_t *place, float *number)
{
    if (!e->left || e->next >= end)
        return 0;
    *place = e->next;
    *number = float_of(le32(take(&e->numbers, 4)));
    if (--e->left)
        e->next += leb(&e->gaps, MAX_PART) + 1;
    return 1;
}

/* Weights of a part from its levels, from the first row to the last: a row is written where the
   levels of later rows don't lie. */
static wv_status dequantize(wv_archive *a, part *p)
{
    typedef union { int32_t integer; float real; } value;
    const uint32_t columns = p->columns, channels = p->channels, kernel = p->kernel;
    const uint32_t pairs = p->axes ? (kernel + 1) / 2 : 0;
    const wv_dtype as = type_of(a, p->of);
    const int trellis = p->method, integers = a->levels;
    const uint32_t wide = integers ? 4 : size_of(as);
    int64_t *sums = take_memory(a, 8 * (size_t)pairs * (1 + kernel) + 6 * (size_t)columns);
    if (!sums)
        return WV_MEMORY;
    int64_t *matrix = sums + pairs;
    value *values = (value *)(void *)(matrix + (size_t)kernel * pairs);
    int16_t *n = (int16_t *)(void *)(values + columns);
    wv_status status = p->axes ? kernel_matrix(a, p, matrix) : WV_OK;
    const float unit = p->step * float_of((127u - p->shift - (p->method ? 2 : 0)) << 23);
    escapes late = p->escapes;
    uint8_t *out = p->of->into + p->first * wide;
    for (uint32_t row = 0; row < p->rows && !status; row++, out += (size_t)columns * wide) {
        const int8_t *levels = (const int8_t *)(p->levels + (size_t)row * columns);
        const uint64_t begin = (uint64_t)row * columns;
        uint32_t state = 0;
        uint64_t place;
        float number;
        for (uint32_t j = 0; j < columns && !trellis; j++)
            n[j] = levels[j];
        for (uint32_t j = 0; j < columns && trellis; j++) {
            const int k = levels[j];
            n[j] = (int16_t)(4 * k + (int)(state & 2)); /* higher bits of the state don't matter */
            state = state << 1 | (((uint32_t)k ^ state ^ state >> 2) & 1);
        }
        while (next_escape(&p->escapes, begin + columns, &place, &number))
            n[place - begin] = 0;
        for (uint32_t j = 0; j < columns && !pairs; j++)
            if (integers)
                values[j].integer = n[j];
            else
                values[j].real = (float)n[j];
        for (uint32_t c = 0; c < channels && pairs; c++) {
            memset(sums, 0, pairs * sizeof *sums);
            for (uint32_t f = 0; f < kernel; f++) {
                const int64_t level = n[(size_t)f * channels + c], *weights = matrix + (size_t)f * pairs;
                if (level)
                    for (uint32_t i = 0; i < pairs; i++)
                        sums[i] += level * weights[i];
            }
            for (uint32_t i = 0; i < kernel; i++)
                values[(size_t)c * kernel + i].real = (float)of_pair(sums, i);
        }
        while (next_escape(&late, begin + columns, &place, &number)) {
            const uint32_t at = (uint32_t)(place - begin), f = at / channels;
            if (integers && !(number > -2147483648.0f && number < 2147483648.0f))
                status = WV_LEVELS;
            else if (integers)
                values[at].integer = (int32_t)number;
            else if (!p->axes)
                values[at].real = number;
            else
                for (uint32_t i = 0; i < kernel; i++) {
                    float *to = &values[(size_t)(at % channels) * kernel + i].real;
                    const float product = number * (float)of_pair(matrix + (size_t)f * pairs, i);
                    *to = *to + product;
                }
        }
        if (integers) {
            memcpy(out, values, 4 * (size_t)columns);
            continue;
        }
        const float factor = p->row_steps ? quarter_octaves(p->row_steps[row]) : 1;
        for (uint32_t j = 0; j < columns; j++) {
            const float product = values[j].real * unit;
            values[j].real = product * factor; /* a factor of 1 changes nothing */
        }
        put_row(p->of, as, &values[0].real, columns, out);
    }
    give_memory(a, sums);
    p->of->have += p->size;
    return status;
}

/* --- parts and frames (sections 4 and 5.1) ---------------------------------------------------- */

static wv_status parse_part(wv_archive *a, fields f, part *p)
{
    memset(p, 0, sizeof *p);
    if (!a->tensors)
        return WV_LIMIT;
    uint64_t number = leb(&f, a->tensors - 1);
    p->column = 4 * (uint32_t)leb(&f, MAX_SAMPLES);
    uint64_t first = leb(&f, MAX_ELEMENTS);
    p->rows = (uint32_t)leb(&f, MAX_PART);
    p->columns = (uint32_t)leb(&f, MAX_PART);
    p->method = *take(&f, 1);
    uint32_t has = *take(&f, 1);
    p->step = float_of(le32(take(&f, 4)));
    p->axes = (uint32_t)leb(&f, 4);
    p->kernel = 1;
    for (uint32_t axis = 0; axis < p->axes && !f.bad; axis++) {
        if (!a->found_bases)
            return WV_LIMIT;
        p->bases[axis] = (uint32_t)leb(&f, a->found_bases - 1);
        fields basis = {a->bases[p->bases[axis]], NULL, WV_OK};
        basis.end = basis.at + 10;
        p->kernel *= (uint32_t)leb(&basis, MAX_KERNEL);
        if (!p->kernel || p->kernel > MAX_KERNEL)
            return WV_FORMAT;
    }
    p->shift = p->axes ? *take(&f, 1) : 0;
    if (f.bad)
        return f.bad;
    const wv_tensor *t = &a->all[number].is;
    const uint64_t size = (uint64_t)p->rows * p->columns;
    if (!size || size > MAX_PART || p->columns % p->kernel || t->dtype > WV_BF16
        || (first + p->rows) > t->elements / p->columns || t->elements % p->columns)
        return WV_FORMAT;
    if (p->method > 1 || has > 15)
        return WV_VERSION;
    if (p->shift > 24 || (has & HAS_FREQUENCY_STEPS && !p->axes)
        || !(p->step >= 7.7037197775489434e-34f && p->step <= 1.2980742146337069e33f))
        return WV_FORMAT;
    p->of = a->all + number;
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
        e->left = (uint32_t)leb(&f, (uint64_t)(f.end - f.at) / 5);
        uint64_t place = 0;
        e->gaps = f;
        for (uint32_t i = 0; i < e->left; i++)
            place += leb(&f, MAX_PART) + 1;
        e->numbers = f;
        take(&f, 4 * (uint64_t)e->left);
        if (!f.bad && (!e->left || place > size))
            return WV_FORMAT;
        e->next = leb(&e->gaps, MAX_PART);
    }
    return ends(&f);
}

/* Places of energies by falling energy, equal ones in their own order; where each energy starts. */
static void sort_falling(uint32_t *order, uint32_t *start, int top, uint32_t count,
                         const uint8_t *inner, uint32_t inner_count, const uint8_t *outer)
{
    uint32_t next[2 * MAX_ENERGY + 1] = {0}, at = 0;
    for (uint32_t i = 0; i < count; i++)
        next[inner[i % inner_count] + (outer ? outer[i / inner_count] : 0)]++;
    start[top + 1] = 0;
    for (int e = top; e >= 0; e--) {
        uint32_t some = next[e];
        next[e] = at;
        at += some;
        start[e] = at; /* the end of e, and the start of e - 1 */
    }
    for (uint32_t i = 0; i < count; i++)
        order[next[inner[i % inner_count] + (outer ? outer[i / inner_count] : 0)]++] = i;
}

/* Goes to the next rectangle that has elements. */
static void next_rectangle(part *p)
{
    for (;; p->row_energy--) {
        if (p->row_energy < 0 || p->class_ - p->row_energy > 2 * MAX_ENERGY) {
            if (--p->class_ < 0)
                return;
            p->row_energy = p->class_ < MAX_ENERGY ? p->class_ : MAX_ENERGY;
        }
        int e = p->row_energy, c = p->class_ - e;
        if (c > 2 * MAX_ENERGY || p->row_start[e] == p->row_start[e + 1]
            || p->column_start[c] == p->column_start[c + 1])
            continue;
        p->row = p->row_start[e + 1];
        p->at_column = p->column_start[c + 1];
        return;
    }
}

/* Takes the next levels of a part, in coding order. */
static void scatter(part *p, const uint8_t *levels, uint32_t count)
{
    if (!p->energies) {
        memcpy(p->levels + p->have, levels, count);
        p->have += count;
        return;
    }
    p->have += count;
    while (count) {
        const int e = p->row_energy, c = p->class_ - e;
        uint32_t end = p->column_start[c], some = end - p->at_column;
        uint8_t *row = p->levels + (size_t)p->row_order[p->row] * p->columns;
        const uint32_t *order = p->column_order + p->at_column;
        some = some < count ? some : count;
        for (uint32_t i = 0; i < some; i++)
            row[order[i]] = levels[i];
        levels += some;
        count -= some;
        p->at_column += some;
        if (p->at_column < end)
            return;
        p->at_column = p->column_start[c + 1];
        if (++p->row == p->row_start[e]) {
            p->row_energy--;
            next_rectangle(p);
        }
    }
}

/* Takes a part's samples from a picture, from a ribbon column on, as far as there are. */
static void gather(const wv_archive *a, part *p, uint32_t column, const uint8_t *luma, size_t stride)
{
    const uint32_t capacity = a->height / BAND * a->width;
    for (; p->have < p->size && column < capacity; column++) {
        const uint8_t *from = luma + (size_t)(column / a->width) * BAND * stride + column % a->width;
        uint8_t levels[BAND];
        uint32_t count = p->size - p->have < BAND ? p->size - p->have : BAND;
        for (uint32_t i = 0; i < count; i++)
            levels[i] = from[i * stride] ^ 0x80;
        scatter(p, levels, count);
    }
}

/* Elements that a tensor of an update has in the base. */
static wv_status from_base(wv_archive *a, const tensor *t, wv_dtype as, void *to)
{
    if (!a->base)
        return WV_BASE;
    const uint32_t found = *slot_of(a->base, t->is.name, t->is.name_bytes);
    const wv_tensor *b = found ? &a->base->all[found - 1].is : NULL;
    if (!b || b->dtype != t->is.dtype || b->axes != t->is.axes
        || (b->axes && memcmp(b->shape, t->is.shape, b->axes * sizeof *b->shape)))
        return WV_BASE;
    return wv_load(a->base, b, as, to, wv_bytes(b, as));
}

static void finish_tensor(wv_archive *a, tensor *t, wv_status status)
{
    uint8_t *room = t->room;
    if (t->into != room) {
        const wv_dtype type = t->is.dtype, as = a->only ? a->only_type : a->sink->type;
        const uint32_t size = size_of(type), wide = size_of(as);
        for (uint64_t i = 0; (!status || status == WV_COARSE) && i < t->is.elements; i++)
            put_element(t, as, get_bits(type, size, t->into + i * size), room + i * wide);
        give_memory(a, t->into);
    }
    give_memory(a, t->sha);
    t->sha = NULL;
    t->room = t->into = NULL;
    t->begun = NOTHING;
    t->done = 1;
    if (room && !a->only)
        a->sink->end(a->sink->user, &t->is, room, status);
}

static void finish_layer(wv_archive *a, tensor *t)
{
    t->begun = NOTHING;
    t->layer++;
    if (!--t->left)
        finish_tensor(a, t, WV_OK);
}

/* Asks for the room of a tensor, and gets what its first layer is added to. */
static wv_status begin_tensor(wv_archive *a, tensor *t)
{
    const uint32_t mask = mask_of(a, t), added = mask & (mask - 1);
    const wv_dtype wanted = a->only ? a->only_type : a->sink->type;
    const wv_dtype as = size_as(&t->is, wanted) && wanted != WV_STORED ? wanted : t->is.dtype;
    const uint64_t bytes = t->is.elements * size_of(as), own = t->is.elements * size_of(t->is.dtype);
    if (bytes > SIZE_MAX || own > SIZE_MAX)
        return WV_MEMORY;
    if (!a->only)
        t->room = a->sink->begin(a->sink->user, &t->is, (size_t)bytes);
    t->into = t->room;
    if (!t->room)
        return WV_OK;
    if (!t->left)
        return from_base(a, t, as, t->room);
    if (added && as != t->is.dtype && !(t->into = take_memory(a, (size_t)own))) {
        t->into = t->room;
        return WV_MEMORY;
    }
    return t->mask & 1 ? from_base(a, t, WV_STORED, t->into) : WV_OK;
}

/* Begins a layer of a tensor, or goes on with it. */
static wv_status begin(wv_archive *a, tensor *t, int kind, int *wanted)
{
    *wanted = 0;
    if (a->only && a->only != t)
        return WV_OK;
    if (!t->begun) {
        if (!t->left || t->done)
            return WV_FORMAT;
        if (!t->layer)
            RETURN_IF(begin_tensor(a, t));
        t->begun = (uint8_t)kind;
        t->added = t->layer || t->mask & 1;
        t->have = 0;
    }
    *wanted = t->room != NULL;
    return t->begun == kind ? WV_OK : WV_FORMAT;
}

static wv_status start_part(wv_archive *a, part *p)
{
    tensor *t = p->of;
    if (p->first != t->have)
        return WV_FORMAT;
    if (a->levels && (p->method || p->axes || p->row_steps))
        return WV_LEVELS;
    if (a->levels && !p->first)
        a->levels_step = p->step;
    if (!p->first && !a->levels && (t->added || a->checks == WV_CHECK_ALL)) {
        t->sha = take_memory(a, sizeof *t->sha);
        if (!t->sha)
            return WV_MEMORY;
        sha_start(t->sha);
    }
    const uint32_t wide = a->levels ? 4 : size_of(type_of(a, t));
    const size_t orders = p->energies ? 4 * ((size_t)p->rows + p->columns) : 0;
    p->levels = t->into + (p->first + p->size) * wide - p->size;
    if (orders || t->added) {
        p->memory = take_memory(a, orders + (t->added ? p->size : 0));
        if (!p->memory)
            return WV_MEMORY;
    }
    if (t->added)
        p->levels = p->memory + orders;
    if (p->energies) {
        const uint8_t *channels = p->energies + p->rows;
        p->row_order = (uint32_t *)(void *)p->memory;
        p->column_order = p->row_order + p->rows;
        sort_falling(p->row_order, p->row_start, MAX_ENERGY, p->rows, p->energies, p->rows, NULL);
        sort_falling(p->column_order, p->column_start, 2 * MAX_ENERGY, p->columns, channels,
                     p->channels, channels + p->channels);
        p->class_ = 3 * MAX_ENERGY;
        p->row_energy = MAX_ENERGY;
        next_rectangle(p);
    }
    return WV_OK;
}

/* Keeps a part that goes on in the next frame, with its record: the sidecar goes. */
static wv_status keep_part(wv_archive *a, const part *from, fields record_data)
{
    const size_t bytes = (size_t)(record_data.end - record_data.at);
    part *p = a->open = take_memory(a, sizeof *p);
    if (!p) {
        give_memory(a, from->memory);
        return WV_MEMORY;
    }
    *p = *from;
    p->record = take_memory(a, bytes);
    if (!p->record)
        return WV_MEMORY;
    memcpy(p->record, record_data.at, bytes);
    const uint8_t **pointers[7] = {&p->frequency_steps, &p->row_steps, &p->energies,
                                   &p->escapes.gaps.at, &p->escapes.gaps.end,
                                   &p->escapes.numbers.at, &p->escapes.numbers.end};
    for (int i = 0; i < 7; i++)
        if (*pointers[i])
            *pointers[i] = p->record + (*pointers[i] - record_data.at);
    return WV_OK;
}

static void drop_part(wv_archive *a)
{
    if (a->open) {
        give_memory(a, a->open->memory);
        give_memory(a, a->open->record);
        give_memory(a, a->open);
        a->open = NULL;
    }
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
    if (t->begun != PARTS || (t->room && t->have != t->is.elements))
        return WV_FORMAT;
    const int right = !t->sha || MATCHES(sha_is(t->sha, head, 8));
    give_memory(a, t->sha);
    t->sha = NULL;
    if (right)
        finish_layer(a, t);
    else
        finish_tensor(a, t, WV_DIGEST);
    return right ? WV_OK : WV_DIGEST;
}

/* Takes a frame; without its packet the one that the built-in decoder shows. */
static wv_status take_frame(wv_archive *a, uint32_t number, const uint8_t *packet, size_t bytes)
{
    const uint8_t *luma = a->luma;
    size_t stride = a->width;
    const uint32_t capacity = a->height / BAND * a->width;
    fields all = a->sidecar_body, data;
    uint64_t type;
    if (packet) {
        a->shown = 0;
        RETURN_IF(a->decoder.decode(a->decoder.user, packet, bytes, &luma, &stride));
        if (a->checks != WV_CHECK_NONE) {
            sha256 sha;
            sha_start(&sha);
            for (uint32_t y = 0; y < a->height; y++)
                sha_add(&sha, luma + y * stride, a->width);
            while (record(&all, &type, &data) && type != R_FRAME)
                ;
            leb(&data, MAX_FRAMES);
            if (!MATCHES(sha_is(&sha, take(&data, 32), 32)))
                return WV_DIGEST;
        }
        a->shown = a->hevc ? number + 1 : 0;
    }
    uint64_t free = 0;
    if (a->open) {
        free = (a->open->size - a->open->have + BAND - 1) / BAND;
        gather(a, a->open, 0, luma, stride);
        if (a->open->have == a->open->size) {
            wv_status status = dequantize(a, a->open);
            drop_part(a);
            RETURN_IF(status);
        }
    }
    for (all = a->sidecar_body; record(&all, &type, &data);) {
        part p;
        int wanted;
        if (type != R_PART)
            continue;
        RETURN_IF(parse_part(a, data, &p));
        if (p.column < free || p.column >= capacity)
            return WV_FORMAT;
        free = p.column + (p.size + BAND - 1) / BAND;
        RETURN_IF(begin(a, p.of, PARTS, &wanted));
        if (!wanted)
            continue;
        wv_status status = start_part(a, &p);
        if (!status) {
            gather(a, &p, p.column, luma, stride);
            if (p.have < p.size) {
                RETURN_IF(keep_part(a, &p, data));
                continue;
            }
            status = dequantize(a, &p);
        }
        give_memory(a, p.memory);
        RETURN_IF(status);
    }
    for (all = a->sidecar_body; record(&all, &type, &data);)
        if (type == R_END)
            RETURN_IF(take_end(a, data));
    return all.bad;
}

/* --- exact tensors (section 6) ---------------------------------------------------------------- */

/* Takes the bits of an exact element; in a layer that is added, of how far they are from those before. */
static void put_exact(const tensor *t, wv_dtype as, uint64_t bits, uint8_t *to)
{
    const wv_dtype type = t->is.dtype;
    if (t->added)
        bits = get_bits(type, size_of(type), to) + (bits >> 1 ^ (0 - (bits & 1)));
    put_element(t, as, bits, to);
}

/* An item: elements of a tensor that follow each other. */
typedef struct item {
    tensor *of;
    uint64_t first, count;
    wv_dtype as;
    int wanted;
} item;

static wv_status next_item(const wv_archive *a, fields *list, item *next)
{
    const uint64_t number = leb(list, a->tensors - 1);
    next->first = leb(list, MAX_ELEMENTS);
    next->count = leb(list, MAX_ELEMENTS);
    next->of = a->all + number;
    return list->bad ? list->bad : next->first + next->count > next->of->is.elements ? WV_FORMAT : WV_OK;
}

static wv_status begin_item(wv_archive *a, item *one)
{
    tensor *t = one->of;
    RETURN_IF(begin(a, t, ITEMS, &one->wanted));
    if (one->wanted && a->levels)
        return WV_LEVELS;
    if ((!a->only || a->only == t) && (one->first != t->have || (t->added && t->is.dtype == WV_C128)))
        return WV_FORMAT;
    one->as = one->wanted ? type_of(a, t) : WV_STORED;
    return WV_OK;
}

static void end_item(wv_archive *a, const item *one)
{
    tensor *t = one->of;
    if (t->begun != ITEMS)
        return;
    t->have += one->count;
    if (t->have == t->is.elements)
        finish_layer(a, t);
}

static wv_status take_planes(wv_archive *a, fields items, uint64_t left, fields data)
{
    while (left) {
        /* A group: items of elements of one size, whose bytes lie in planes. */
        fields ahead = items;
        uint64_t count = 0, group = 0, at = 0;
        uint32_t size = 0;
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
        if (data.bad)
            return data.bad;
        for (left -= group; group; group--, at += one.count) {
            RETURN_IF(next_item(a, &items, &one));
            RETURN_IF(begin_item(a, &one));
            const uint32_t piece = size > 8 ? 8 : size;
            for (uint64_t i = 0; one.wanted && i < one.count; i++)
                for (uint32_t from = 0; from < size; from += piece) {
                    uint64_t bits = 0;
                    for (uint32_t byte = 0; byte < piece; byte++)
                        bits |= (uint64_t)planes[(from + byte) * count + at + i] << 8 * byte;
                    uint8_t *to = one.of->into + (one.first + i) * size_of(one.as) + from;
                    if (size > 8)
                        put_bits(WV_U64, 8, bits, to);
                    else
                        put_exact(one.of, one.as, bits, to);
                }
            end_item(a, &one);
        }
    }
    RETURN_IF(ends(&items));
    return ends(&data);
}

/* A plane of floats; where it is deflated, in memory of its own. */
static wv_status read_plane(wv_archive *a, fields *data, uint64_t size, const uint8_t **plane, void **memory)
{
    const uint64_t coded = leb(data, MAX_BODY);
    const uint8_t *from = take(data, coded ? coded : size);
    *plane = from;
    if (data->bad || !coded)
        return data->bad;
    if (size / 1032 > coded) /* deflate makes no more of a byte */
        return WV_FORMAT;
    *plane = *memory = take_memory(a, (size_t)size);
    return !*memory ? WV_MEMORY : inflate(from, (size_t)coded, *memory, (size_t)size) ? WV_FORMAT : WV_OK;
}

/* Bit-exact floats (section 6). Rows are read in their own order: where their bytes lie in the planes
   is counted by key. `planes`: keys, top, middle, low ones. */
static wv_status take_floats(wv_archive *a, const fields items, uint64_t left, fields data, void *memory[5])
{
    const uint8_t *planes[5];
    uint64_t total = 0, rows = 0, place[96] = {0}, lows[3] = {0}, sum = 0;
    fields ahead = items;
    item one = {NULL, 0, 0, WV_STORED, 0};
    wv_dtype type = WV_STORED;
    fields lengths = data;
    for (uint64_t i = 0; i < left; i++) {
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
    if (type < WV_F32 || type > WV_BF16)
        return WV_FORMAT;
    const uint32_t mantissa = type == WV_F32 ? 23 : type == WV_F16 ? 10 : 7;
    const uint32_t width = 8 * size_of(type), low_planes = type == WV_F32 ? 2 : type == WV_F16;
    if (total * width / 8 > MAX_BODY)
        return WV_LIMIT;
    RETURN_IF(read_plane(a, &data, 3 * rows, &planes[0], &memory[0]));
    /* Two walks over the rows: the first one counts. */
    for (int walk = 0; walk < 2; walk++) {
        fields list = items, length_list = lengths;
        uint64_t row = 0;
        uint32_t low_scale = 0;
        for (uint64_t i = 0; i < left; i++) {
            RETURN_IF(next_item(a, &list, &one));
            uint64_t length = leb(&length_list, MAX_BODY), here;
            length += !length;
            if (walk)
                RETURN_IF(begin_item(a, &one));
            for (uint64_t done = 0; done < one.count; done += here, row++) {
                const uint32_t zeros = planes[0][2 * rows + row];
                low_scale = (low_scale + planes[0][row]) & 0xFF;
                const uint32_t scale = low_scale | (uint32_t)planes[0][rows + row] << 8;
                if (zeros > mantissa)
                    return WV_FORMAT;
                uint64_t *at = place + 4 * zeros + (scale & 3);
                here = one.count - done < length ? one.count - done : length;
                for (uint64_t j = *at; walk && one.wanted && j < *at + here; j++) {
                    const uint32_t middle = planes[2][j];
                    uint32_t bits = planes[1][j] + ((middle & 0xC0) << 2) + (scale & 0xFFFC) - 128;
                    bits = (bits & ((1u << (width + 1 - mantissa)) - 1)) << (mantissa - 2);
                    bits |= (middle & 32) << (width - 6) | (middle & 31) << (mantissa - 7);
                    for (uint32_t k = 0; k < low_planes; k++)
                        if (zeros < 8 * (k + 1))
                            bits |= (uint32_t)planes[3 + k][j] << 8 * k;
                    put_exact(one.of, one.as, bits,
                              one.of->into + (one.first + done + (j - *at)) * size_of(one.as));
                }
                *at += here;
            }
            if (walk)
                end_item(a, &one);
        }
        for (uint32_t key = 0; !walk && key < 96; key++) {
            const uint64_t count = place[key];
            place[key] = sum;
            sum += count;
            for (uint32_t k = 0; k < 2; k++)
                lows[1 + k] = key / 4 < 8 * (k + 1) ? sum : lows[1 + k];
        }
        lows[0] = total;
        for (uint32_t k = 0; !walk && k < 2 + low_planes; k++)
            RETURN_IF(read_plane(a, &data, k < 2 ? total : lows[k - 1], &planes[1 + k], &memory[1 + k]));
        RETURN_IF(ends(&data));
    }
    return WV_OK;
}

static wv_status take_exact(wv_archive *a, const uint8_t *payload, size_t size)
{
    fields body, found[3] = {{0}}, one; /* items, data, floats */
    uint64_t type;
    /* The body goes behind the payload where there is room: that of packets is mostly larger. */
    const size_t used = a->data ? a->packet.room : (size_t)(payload - a->packet.data) + size;
    buffer rest = {a->packet.data, 0}, *room = &a->sidecar;
    if (size >= 9 && a->packet.room - used >= le32(payload + 5) && used < a->packet.room) {
        rest.data += used;
        rest.room = a->packet.room - used;
        room = &rest;
    }
    RETURN_IF(open_body(a, payload, size, room, 0, &body));
    while (record(&body, &type, &one)) {
        if (type != R_ITEMS && type != R_DATA && type != R_FLOATS) {
            RETURN_IF(unknown(type));
            continue;
        }
        fields *to = found + (type == R_FLOATS ? 2 : (type - R_ITEMS) / 2);
        if (to->at)
            return WV_FORMAT;
        *to = one;
    }
    if (body.bad || !found[0].at || !found[1].at == !found[2].at)
        return body.bad ? body.bad : WV_FORMAT;
    const uint64_t count = leb(&found[0], MAX_TENSORS);
    if (count && !a->tensors)
        return WV_LIMIT;
    if (found[1].at)
        return take_planes(a, found[0], count, found[1]);
    void *memory[5] = {NULL, NULL, NULL, NULL, NULL};
    wv_status status = take_floats(a, found[0], count, found[2], memory);
    for (int i = 0; i < 5; i++)
        give_memory(a, memory[i]);
    return status;
}

/* --- boxes, in the order of the file ---------------------------------------------------------- */

enum { OTHER, HEADER, FILE_BOX, FRAME, EXACT, INDEX };

/* A box, and where its payload lies (of ours behind the extended type). */
typedef struct box {
    const uint8_t *kind, *payload;
    size_t size;
    int ours;
} box;

static void open_box(box *b, const uint8_t *kind, const uint8_t *payload, size_t size)
{
    static const char ours[5][7] = {"header", "file\0", "frame", "exact", "index"};
    b->kind = kind;
    b->payload = payload;
    b->size = size;
    b->ours = OTHER;
    if (memcmp(kind, "uuid", 4) || size < 16 || memcmp(payload, "weightvid-", 10))
        return;
    for (int i = 0; i < 5; i++)
        if (!memcmp(payload + 10, ours[i], 6)) {
            b->ours = HEADER + i;
            b->payload += 16;
            b->size -= 16;
        }
}

static wv_status take_sidecar(wv_archive *a, const box *b, uint32_t number)
{
    fields body, data;
    uint64_t type;
    uint32_t frames = 0;
    RETURN_IF(open_body(a, b->payload, b->size, &a->sidecar, !a->data, &body));
    a->sidecar_body = body;
    while (record(&body, &type, &data)) {
        if (type == R_FRAME) {
            frames++;
            if (leb(&data, (uint64_t)1 << 32) != number && !data.bad)
                return WV_FORMAT;
            take(&data, 32);
            RETURN_IF(ends(&data));
        } else if (type != R_PART && type != R_END) {
            RETURN_IF(unknown(type));
        }
    }
    return body.bad ? body.bad : frames == 1 ? WV_OK : WV_FORMAT;
}

static wv_status check_moof(const box *b, uint32_t number)
{
    size_t size;
    const uint8_t *head = memcmp(b->kind, "moof", 4) ? NULL : child(b->payload, b->size, "mfhd", &size);
    return head && size == 8 && be32(head) == 0 && be32(head + 4) == number + 1 ? WV_OK : WV_FORMAT;
}

static wv_status take_mdat(wv_archive *a, const box *b, uint32_t number)
{
    return memcmp(b->kind, "mdat", 4) || !b->size ? WV_FORMAT : take_frame(a, number, b->payload, b->size);
}

/* Before the first frame: tensors that have no layer in this file are those of the base. */
static wv_status start_all(wv_archive *a)
{
    wv_status status = WV_OK;
    a->stage = AT_BODY;
    a->frame = a->switches = a->missing = 0;
    a->exact_seen = 0;
    for (uint32_t i = 0; i < a->tensors; i++) {
        tensor *t = a->all + i;
        t->layer = t->left = t->done = 0;
        t->have = 0;
        for (uint32_t mask = mask_of(a, t) >> 1; mask; mask &= mask - 1)
            t->left++;
    }
    for (uint32_t i = 0; i < a->tensors && !status; i++) {
        tensor *t = a->all + i;
        if (t->left || (a->only && a->only != t))
            continue;
        status = mask_of(a, t) ? begin_tensor(a, t) : WV_FORMAT;
        finish_tensor(a, t, status);
    }
    return status;
}

/* Whether what is wanted is there before the end of the file. */
static int has_all(wv_archive *a)
{
    while (a->missing < a->tensors && a->all[a->missing].done)
        a->missing++;
    return a->stage == AT_BODY && a->missing == a->tensors && a->layers < a->all_layers;
}

/* Takes one whole box. Its payload may lie in a->packet. */
static wv_status take_box(wv_archive *a, const box *b)
{
    fields body;
    int wanted = 0;
    switch (a->stage) {
    case AT_FTYP:
        for (size_t i = 0; i + 4 <= b->size; i += 4)
            wanted |= i != 4 && !memcmp(b->payload + i, "wvid", 4);
        if (memcmp(b->kind, "ftyp", 4) || !wanted)
            return WV_NO_ARCHIVE;
        a->stage = AT_MOOV;
        return WV_OK;
    case AT_MOOV:
        a->stage = AT_HEADER;
        return memcmp(b->kind, "moov", 4) ? WV_FORMAT : read_moov(a, b->payload, b->size);
    case AT_HEADER: {
        buffer room = {NULL, 0};
        if (b->ours != HEADER)
            return WV_FORMAT;
        wv_status status = open_body(a, b->payload, b->size, &room, 1, &body);
        a->header = room.data;
        a->scratch += room.room;
        RETURN_IF(status);
        RETURN_IF(read_header(a, body));
        a->stage = AT_BODY;
        return a->stream ? start_all(a) : WV_OK;
    }
    case AT_BODY:
        switch (b->ours) {
        case FILE_BOX:
            return a->frame ? WV_FORMAT : WV_OK;
        case FRAME:
            a->stage = AT_MOOF;
            /* Frames come after exact boxes where a layer ends. */
            a->switches += (uint32_t)a->exact_seen;
            a->exact_seen = 0;
            return a->switches < a->all_layers ? take_sidecar(a, b, a->frame) : WV_FORMAT;
        case EXACT:
            a->exact_seen = 1;
            return take_exact(a, b->payload, b->size);
        default:
            a->stage = AT_END;
            return b->ours == INDEX ? WV_OK : WV_FORMAT;
        }
    case AT_MOOF:
        a->stage = AT_MDAT;
        return check_moof(b, a->frame);
    case AT_MDAT:
        a->stage = AT_BODY;
        return take_mdat(a, b, a->frame++);
    default:
        return WV_OK;
    }
}

static wv_status box_bytes(const uint8_t *head, size_t *payload)
{
    size_t size = be32(head);
    if (size < 8 || size > 2 * (size_t)MAX_BODY)
        return WV_FORMAT;
    *payload = size - 8;
    return WV_OK;
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
    if (size > a->reader.size - *at)
        return WV_TRUNCATED;
    const uint8_t *payload;
    if (a->data) {
        payload = a->data + *at;
    } else {
        RETURN_IF(grow(a, &a->packet, size));
        RETURN_IF(read_bytes(a, *at, a->packet.data, size));
        payload = a->packet.data;
    }
    *at += size;
    open_box(b, a->head + 4, payload, size);
    return WV_OK;
}

/* Reads a box that must be one of ours. */
static wv_status read_ours(wv_archive *a, uint64_t *at, int ours, box *b)
{
    RETURN_IF(read_box(a, at, b));
    return b->ours == ours ? WV_OK : WV_FORMAT;
}

/* --- the index (section 7) -------------------------------------------------------------------- */

static wv_status load_frame(wv_archive *a, uint64_t at, uint32_t number)
{
    box b;
    RETURN_IF(read_ours(a, &at, FRAME, &b));
    RETURN_IF(take_sidecar(a, &b, number));
    if (a->shown == number + 1) /* tensors that are read one by one share frames */
        return take_frame(a, number, NULL, 0);
    RETURN_IF(read_box(a, &at, &b));
    RETURN_IF(check_moof(&b, number));
    RETURN_IF(read_box(a, &at, &b));
    return take_mdat(a, &b, number);
}

static wv_status load_box(wv_archive *a, uint64_t at)
{
    box b;
    RETURN_IF(read_ours(a, &at, EXACT, &b));
    return take_exact(a, b.payload, b.size);
}

/* Walks over the index, and reads what it lists of a tensor. Without one: checks it. */
static wv_status walk_index(wv_archive *a, const tensor *t)
{
    const uint64_t last = a->tensors ? a->tensors - 1 : 0;
    fields frames = a->lists[0], spans = a->lists[1], boxes = a->lists[2], stages = a->lists[3];
    const uint64_t all = frames.at ? leb(&frames, MAX_FRAMES) : 0;
    uint64_t frames_left = all, boxes_left = boxes.at ? leb(&boxes, MAX_TENSORS) : 0;
    uint64_t first[MAX_LAYERS + 1], end[MAX_LAYERS + 1], begin_at = 0, at = a->body;
    uint32_t found = 0, frame = 0;
    if (all > (uint64_t)(frames.end - frames.at))
        return WV_FORMAT;
    for (uint64_t left = spans.at ? leb(&spans, MAX_LAYERS * MAX_TENSORS) : 0; left && !spans.bad; left--) {
        const uint64_t number = leb(&spans, last);
        begin_at += leb(&spans, all);
        if (begin_at > all || !a->tensors)
            return WV_LIMIT;
        const uint64_t many = leb(&spans, all - begin_at);
        if (!t || number != t->is.number)
            continue;
        if (found > MAX_LAYERS)
            return WV_FORMAT;
        first[found] = begin_at;
        end[found++] = begin_at + many;
    }
    uint64_t stages_left = stages.at ? leb(&stages, MAX_LAYERS) : 1;
    for (uint64_t turn = 0; turn < 2 * stages_left && !stages.bad; turn++) {
        uint64_t *left = turn & 1 ? &boxes_left : &frames_left;
        fields *list = turn & 1 ? &boxes : &frames;
        uint64_t some = stages.at ? leb(&stages, MAX_BODY) : *left;
        for (some = some < *left ? some : *left; some && !list->bad; some--, --*left) {
            const uint64_t bytes = leb(list, (uint64_t)MAX_BODY * (list == &frames ? 3 : 2));
            int wanted = 0;
            if (list == &frames)
                for (uint32_t i = 0; i < found; i++)
                    wanted |= first[i] <= frame && frame < end[i];
            else
                for (uint64_t few = leb(list, MAX_TENSORS); few && !list->bad; few--)
                    wanted |= leb(list, last) == (t ? t->is.number : MAX_TENSORS);
            if (wanted && list == &frames)
                RETURN_IF(load_frame(a, at, frame));
            else if (wanted && !a->levels)
                RETURN_IF(load_box(a, at));
            if (t && t->done)
                return WV_OK;
            frame += list == &frames;
            at += bytes;
        }
    }
    const fields *lists[4] = {&frames, &spans, &boxes, &stages};
    for (int i = 0; i < 4; i++)
        if (lists[i]->at)
            RETURN_IF(ends(lists[i]));
    return frames_left || boxes_left ? WV_FORMAT : WV_OK;
}

static wv_status parse_index(wv_archive *a, fields body)
{
    fields one;
    uint64_t type;
    while (record(&body, &type, &one)) {
        if (type == R_ROOT) {
            a->root = take(&one, 32);
            RETURN_IF(one.bad);
        } else if (type < R_FRAMES || type > R_STAGES || type & 1) {
            RETURN_IF(unknown(type));
        } else if (a->lists[type / 2 - 32].at) {
            return WV_FORMAT;
        } else {
            a->lists[type / 2 - 32] = one;
        }
    }
    RETURN_IF(body.bad);
    return walk_index(a, NULL);
}

/* Finds the index; a file without one is cut short, and can be read front to back alone. */
static wv_status read_index(wv_archive *a)
{
    uint8_t tail[16];
    box b;
    fields body;
    buffer room = {NULL, 0};
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
    wv_status status = read_ours(a, &at, INDEX, &b);
    if (status == WV_READ || status == WV_MEMORY)
        return status;
    if (status || b.size < 4)
        return WV_OK;
    status = open_body(a, b.payload, b.size - 4, &room, 1, &body);
    a->index = room.data;
    a->scratch += room.room;
    return status ? status : parse_index(a, body);
}

/* --- the interface ---------------------------------------------------------------------------- */

static void *standard_alloc(void *user, size_t bytes)
{
    (void)user;
    return malloc(bytes);
}

static void standard_free(void *user, void *memory)
{
    (void)user;
    free(memory);
}

#ifndef WEIGHTVID_NO_HEVC
static wv_status hevc_open(void *user, const char entry[4], const uint8_t *config, size_t bytes,
                           uint32_t width, uint32_t height)
{
    wv_archive *a = user;
    size_t memory = wv_hevc_memory(width, height);
    if (memcmp(entry, "hvc1", 4) || !memory)
        return WV_CODEC;
    a->luma = take_memory(a, (size_t)width * height);
    a->hevc_memory = take_memory(a, memory + 15);
    if (!a->luma || !a->hevc_memory)
        return WV_MEMORY;
    a->scratch += (size_t)width * height + memory + 15;
    uint8_t *aligned = (uint8_t *)a->hevc_memory + (16 - ((uintptr_t)a->hevc_memory & 15)) % 16;
    a->hevc = wv_hevc_open(config, bytes, width, height, aligned, memory);
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

static void hevc_close(void *user)
{
    (void)user;
}
#endif

static wv_status make(wv_archive **made, const wv_options *options)
{
    wv_options chosen = {{NULL, NULL, NULL}, NULL, WV_CHECK_FRAMES};
    if (!made)
        return WV_ARGUMENT;
    *made = NULL;
    if (options)
        chosen = *options;
    if (!chosen.allocator.alloc) {
        chosen.allocator.alloc = standard_alloc;
        chosen.allocator.free = standard_free;
    }
    wv_archive *a = chosen.allocator.alloc(chosen.allocator.user, sizeof *a);
    if (!a)
        return WV_MEMORY;
    memset(a, 0, sizeof *a);
    a->memory = chosen.allocator;
    a->checks = chosen.checks;
    a->layers = MAX_LAYERS;
    a->scratch = sizeof *a;
    *made = a;
    if (chosen.decoder) {
        a->decoder = *chosen.decoder;
        return WV_OK;
    }
#ifdef WEIGHTVID_NO_HEVC
    wv_close(a);
    *made = NULL;
    return WV_ARGUMENT;
#else
    a->decoder.user = a;
    a->decoder.open = hevc_open;
    a->decoder.decode = hevc_decode;
    a->decoder.close = hevc_close;
    return WV_OK;
#endif
}

static wv_status open_file(wv_archive **archive)
{
    wv_archive *a = *archive;
    wv_status status = WV_OK;
    for (int i = 0; i < 3 && !status; i++) {
        box b;
        status = read_box(a, &a->body, &b);
        if (!status)
            status = take_box(a, &b);
    }
    if (!status)
        status = read_index(a);
    if (status) {
        wv_close(a);
        *archive = NULL;
    }
    return status;
}

wv_status wv_open_memory(wv_archive **archive, const void *data, size_t size, const wv_options *options)
{
    if (!data)
        return WV_ARGUMENT;
    RETURN_IF(make(archive, options));
    (*archive)->data = data;
    (*archive)->reader.size = size;
    return open_file(archive);
}

wv_status wv_open_reader(wv_archive **archive, const wv_reader *reader, const wv_options *options)
{
    if (!reader || !reader->read)
        return WV_ARGUMENT;
    RETURN_IF(make(archive, options));
    (*archive)->reader = *reader;
    return open_file(archive);
}

wv_status wv_open_stream(wv_archive **archive, const wv_sink *sink, const wv_options *options)
{
    if (!sink || !sink->begin || !sink->end)
        return WV_ARGUMENT;
    RETURN_IF(make(archive, options));
    (*archive)->sink = sink;
    (*archive)->stream = 1;
    return WV_OK;
}

/* Whether it can be used now: it is no stream, or one that has not begun, and in no other call. */
static int is_ready(const wv_archive *a)
{
    return a && !a->only && (a->stream ? !a->stage && !a->head_have : a->reader.size && !a->sink);
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
        if (a->head_have < 8) {
            a->head[a->head_have++] = *from++;
            size--;
            if (a->head_have < 8)
                continue;
            a->failed = a->stage == AT_FTYP && memcmp(a->head + 4, "ftyp", 4)
                ? WV_NO_ARCHIVE : box_bytes(a->head, &a->box_size);
            a->box_have = 0;
        }
        /* A box that claims more than comes takes no more memory than twice what has come. */
        size_t some = a->box_size - a->box_have < size ? a->box_size - a->box_have : size;
        if (!a->failed && a->box_have + some > a->packet.room) {
            buffer larger = {NULL, 0};
            size_t twice = 2 * (a->box_have + some) + 4096;
            a->failed = grow(a, &larger, twice < a->box_size ? twice : a->box_size);
            if (!a->failed && a->box_have)
                memcpy(larger.data, a->packet.data, a->box_have);
            if (!a->failed) {
                give_memory(a, a->packet.data);
                a->packet = larger;
            }
        }
        if (a->failed)
            break;
        if (some)
            memcpy(a->packet.data + a->box_have, from, some);
        a->box_have += some;
        from += some;
        size -= some;
        if (a->box_have == a->box_size) {
            a->head_have = 0;
            box b;
            open_box(&b, a->head + 4, a->packet.data, a->box_size);
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
    else if (!status && a->missing < a->tensors)
        status = WV_FORMAT;
    for (uint32_t i = 0; i < a->tensors; i++) {
        tensor *t = a->all + i;
        if (t->room || t->begun)
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
    if (a->decoder_open)
        a->decoder.close(a->decoder.user);
    void *all[] = {a->all, a->table, a->shapes, a->texts, (void *)a->pairs, a->files, (void *)a->bases,
                   a->header, a->index, a->packet.data, a->sidecar.data,
                   a->luma, a->hevc_memory};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        give_memory(a, all[i]);
    wv_allocator memory = a->memory;
    memory.free(memory.user, a);
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
    if (!a || a->stage < AT_BODY || place >= a->found_pairs)
        return WV_NOT_FOUND;
    *key = a->pairs[2 * place];
    *value = a->pairs[2 * place + 1];
    return WV_OK;
}

wv_status wv_file(const wv_archive *a, uint32_t place, const char **path, uint64_t *bytes)
{
    if (!a || a->stage < AT_BODY || place >= a->found_files)
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
    RETURN_IF(read_ours(a, &at, FILE_BOX, &b));
    if (b.size < 9 || le32(b.payload + 5) != bytes)
        return WV_FORMAT;
    return open_body(a, b.payload, b.size, &room, 1, &body);
}

size_t wv_scratch_bytes(const wv_archive *a)
{
    return a ? a->scratch : 0;
}

/* Reads boxes front to back, as far as there is something that is wanted. */
static wv_status read_all(wv_archive *a)
{
    wv_status status = start_all(a);
    uint64_t at = a->body;
    while (!status && a->stage != AT_END && !has_all(a)) {
        box b;
        status = read_box(a, &at, &b);
        if (!status)
            status = take_box(a, &b);
    }
    return status;
}

static wv_status load_one(wv_archive *a, const wv_tensor *wanted, void *out)
{
    tensor *t = a->all + wanted->number;
    if (wanted->number >= a->tensors || wanted->elements != t->is.elements)
        return WV_ARGUMENT;
    if (!a->index)
        return WV_TRUNCATED;
    a->only = t;
    t->room = t->into = out;
    wv_status status = start_all(a);
    if (!status && !t->done)
        status = walk_index(a, t);
    if (!status && a->levels && (!t->begun || t->have != t->is.elements))
        status = t->begun ? WV_FORMAT : WV_LEVELS;
    else if (!status && !a->levels && !t->done)
        status = WV_FORMAT;
    if (!t->done)
        finish_tensor(a, t, status);
    drop_part(a);
    a->only = NULL;
    return status;
}

wv_status wv_load(wv_archive *a, const wv_tensor *wanted, wv_dtype type, void *out, size_t bytes)
{
    static uint8_t empty;
    if (!wanted || !is_ready(a) || a->stream || (!out && bytes) || !size_as(wanted, type)
        || bytes != wanted->elements * size_as(wanted, type))
        return WV_ARGUMENT;
    a->only_type = type;
    return load_one(a, wanted, out ? out : &empty);
}

wv_status wv_levels(wv_archive *a, const wv_tensor *wanted, int32_t *out, size_t bytes, float *step)
{
    if (!wanted || !is_ready(a) || a->stream || !out || !step || bytes != 4 * wanted->elements
        || wanted->number >= a->tensors)
        return WV_ARGUMENT;
    if (wanted->dtype > WV_BF16 || a->all[wanted->number].mask != 2)
        return WV_LEVELS;
    a->only_type = WV_STORED;
    a->levels = 1;
    wv_status status = load_one(a, wanted, out);
    a->levels = 0;
    *step = a->levels_step;
    return status;
}

wv_status wv_load_all(wv_archive *a, const wv_sink *sink)
{
    if (!is_ready(a) || a->stream || !sink || !sink->begin || !sink->end)
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
    for (int i = 0; i < (int)status && *text; i++)
        text += strlen(text) + 1;
    return *text ? text : "unknown status";
}
