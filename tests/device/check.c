/* Reads archives by the C loader, and tells Python what it found.

       check one|all|stream|starve stored|f32|f16 ARCHIVE...

   Standard output has records: a letter, the length of its data (8 bytes, little-endian), the data.
   Of each archive: m and v: key and value of metadata; p and f: path and contents of a side file;
   n: name of a tensor, then d: its elements; of `one` for floats also l: its levels and s: the step,
   or e: a status in a byte; at last S: the archive's status, and P: the peak of memory. With a file
   ARCHIVE.luma, which holds stride, size and bytes of the packet, and rows, for each frame, pictures
   come from there. `starve` fails the first, second, third... allocation until none is left. */
#include "weightvid.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEAD = 16, PIECE = 777, MOST = 1 << 28 };

typedef struct bytes {
    uint8_t *data;
    size_t size;
} bytes;

static size_t taken, peak, left;
static int quiet;
static bytes file, pictures;

static void *take(void *user, size_t size)
{
    (void)user;
    if (!left || size > MOST)
        return NULL;
    left--;
    uint8_t *const room = malloc(size + HEAD);
    if (!room)
        return NULL;
    memcpy(room, &size, sizeof size);
    taken += size;
    peak = taken > peak ? taken : peak;
    return room + HEAD;
}

static void give(void *user, void *memory)
{
    size_t size;
    (void)user;
    memcpy(&size, (uint8_t *)memory - HEAD, sizeof size);
    taken -= size;
    free((uint8_t *)memory - HEAD);
}

static void put(char kind, const void *data, size_t size)
{
    uint8_t head[9] = {(uint8_t)kind};
    for (int i = 0; i < 8; i++)
        head[1 + i] = (uint8_t)((uint64_t)size >> 8 * i);
    fwrite(head, 1, sizeof head, stdout);
    if (size)
        fwrite(data, 1, size, stdout);
}

static void *begin(void *user, const wv_tensor *tensor, size_t size)
{
    (void)user;
    (void)tensor;
    return size > MOST ? NULL : malloc(size ? size : 1); /* of the size itself: ASan watches it */
}

static void end(void *user, const wv_tensor *tensor, void *room, wv_status status)
{
    const wv_sink *const sink = user;
    const size_t size = wv_bytes(tensor, sink->type);
    if (!status && !quiet) {
        put('n', tensor->name, tensor->name_bytes);
        put('d', room, size ? size : wv_bytes(tensor, WV_STORED));
    }
    free(room);
}

static int read_at(void *user, uint64_t offset, void *out, size_t size)
{
    const bytes *const from = user;
    if (offset > from->size || size > from->size - offset)
        return 1;
    memcpy(out, from->data + offset, size);
    return 0;
}

static uint32_t little(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static wv_status open_pictures(void *user, const char entry[4], const uint8_t *config, size_t size,
                               uint32_t width, uint32_t height)
{
    *(uint32_t *)user = height;
    return entry[0] && config && size && width ? WV_OK : WV_CODEC;
}

static wv_status find_picture(void *user, const uint8_t *packet, size_t size, const uint8_t **luma,
                              size_t *stride)
{
    const uint8_t *at = pictures.data;
    while (at < pictures.data + pictures.size) {
        const size_t have = little(at + 4);
        *stride = little(at);
        *luma = at + 8 + have;
        if (have == size && !memcmp(at + 8, packet, size))
            return WV_OK;
        at = *luma + *stride * *(uint32_t *)user;
    }
    return WV_CODEC;
}

static void close_pictures(void *user) { *(uint32_t *)user = 0; }

/* What is no argument must be refused. */
static void misuse(wv_archive *archive, const wv_options *options)
{
    const wv_reader unread = {NULL, 9, NULL};
    wv_archive *opened[4] = {archive, archive, archive, archive};
    wv_sink sink = {NULL, WV_BF16, begin, end};
    int right = wv_open_memory(opened, NULL, 9, options) == WV_ARGUMENT
        && wv_open_reader(opened + 1, &unread, options) == WV_ARGUMENT
        && wv_open_stream(opened + 2, NULL, options) == WV_ARGUMENT
        && wv_open_stream(opened + 3, &sink, options) == WV_ARGUMENT && *wv_status_text((wv_status)-1) == 'u'
        && wv_layers(archive, NULL) && wv_metadata(archive, 0, NULL, NULL) == WV_ARGUMENT
        && wv_file(archive, 0, NULL, NULL) == WV_ARGUMENT && wv_load_all(archive, &sink) == WV_ARGUMENT;
    for (int i = 0; i < 4; i++)
        right &= !opened[i];
    if (wv_count(archive)) {
        const wv_tensor other = *wv_get(archive, 0); /* as of another archive */
        const size_t size = wv_bytes(&other, WV_STORED), level_size = 4 * (size_t)other.elements;
        void *const room = malloc((size < level_size ? level_size : size) + 1);
        float step;
        right &= wv_load(archive, &other, WV_STORED, room, size) == WV_ARGUMENT
            && wv_levels(archive, &other, room, level_size, &step) == WV_ARGUMENT;
        free(room);
    }
    if (!right)
        exit(6);
}

static wv_status read_one(wv_archive *archive, wv_dtype type)
{
    wv_status first = WV_OK;
    const char *key, *value;
    uint64_t size;
    for (uint32_t i = 0; !wv_metadata(archive, i, &key, &value); i++) {
        put('m', key, strlen(key));
        put('v', value, strlen(value));
    }
    for (uint32_t i = 0; !wv_file(archive, i, &key, &size); i++) {
        void *const room = malloc((size_t)size + 1);
        const wv_status status = wv_read_file(archive, i, room, (size_t)size);
        put('p', key, strlen(key));
        if (!status)
            put('f', room, (size_t)size);
        first = first ? first : status;
        free(room);
    }
    for (uint32_t i = 0; i < wv_count(archive); i++) {
        const wv_tensor *const tensor = wv_get(archive, i);
        const wv_dtype as = wv_bytes(tensor, type) ? type : WV_STORED;
        const size_t room_size = wv_bytes(tensor, as), level_size = 4 * (size_t)tensor->elements;
        if (strlen(tensor->name) == tensor->name_bytes && wv_find(archive, tensor->name) != tensor)
            exit(3);
        if (room_size > MOST || level_size > MOST)
            continue;
        void *room = malloc(room_size ? room_size : 1);
        wv_status status = wv_load(archive, tensor, as, room, room_size);
        if (!status) {
            put('n', tensor->name, tensor->name_bytes);
            put('d', room, room_size);
        }
        first = first ? first : status;
        free(room);
        if (tensor->dtype > WV_BF16 || type != WV_STORED)
            continue;
        float step;
        room = malloc(level_size ? level_size : 1);
        status = wv_levels(archive, tensor, room, level_size, &step);
        const uint8_t code = (uint8_t)status;
        put(status ? 'e' : 'l', status ? (const void *)&code : room, status ? 1 : level_size);
        put('s', &step, status ? 0 : sizeof step);
        free(room);
    }
    return first;
}

static wv_status read_archive(const char *mode, wv_dtype type)
{
    uint32_t height;
    const wv_decoder decoder = {&height, open_pictures, find_picture, close_pictures};
    const wv_options options = {{NULL, take, give}, pictures.data ? &decoder : NULL, WV_CHECK_ALL};
    wv_sink sink = {NULL, type, begin, end};
    const wv_reader reader = {&file, file.size, read_at};
    wv_archive *archive;
    wv_status status;
    sink.user = &sink;
    if (*mode == 's') {
        status = wv_open_stream(&archive, &sink, &options);
        for (size_t at = 0; !status && at < file.size; at += PIECE)
            status = wv_push(archive, file.data + at, file.size - at < PIECE ? file.size - at : PIECE);
        const wv_status last = archive ? wv_finish(archive) : WV_OK;
        status = status ? status : last;
    } else if (*mode == 'o') {
        status = wv_open_reader(&archive, &reader, &options);
        if (!status)
            misuse(archive, &options);
        status = status ? status : read_one(archive, type);
    } else {
        status = wv_open_memory(&archive, file.data, file.size, &options);
        status = status ? status : wv_load_all(archive, &sink);
    }
    wv_close(archive);
    if (taken || *wv_status_text(status) == 'u')
        exit(4);
    return status;
}

static bytes whole(const char *name)
{
    bytes found = {NULL, 0};
    FILE *const from = fopen(name, "rb");
    if (!from)
        return found;
    if (fseek(from, 0, SEEK_END))
        exit(5);
    found.size = (size_t)ftell(from);
    rewind(from);
    found.data = malloc(found.size + 1);
    if (!found.data || fread(found.data, 1, found.size, from) != found.size)
        exit(5);
    fclose(from);
    return found;
}

int main(int count, char **words)
{
    for (int i = 3; i < count; i++) {
        char name[4096];
        const wv_dtype type = words[2][0] == 's' ? WV_STORED : words[2][1] == '3' ? WV_F32 : WV_F16;
        const int starve = quiet = !strcmp(words[1], "starve");
        file = whole(words[i]);
        snprintf(name, sizeof name, "%s.luma", words[i]);
        pictures = whole(name);
        peak = 0;
        uint8_t status = WV_MEMORY;
        for (size_t most = starve ? 0 : SIZE_MAX; status == WV_MEMORY; most++) {
            left = most;
            status = (uint8_t)read_archive(starve ? "all" : words[1], type);
            if (!starve || most == 1000)
                break;
        }
        put('S', &status, 1);
        put('P', &peak, sizeof peak);
        free(file.data);
        free(pictures.data);
    }
    return 0;
}
