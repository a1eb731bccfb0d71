// Attention in float32, on a case of `refattn vectors write FOLDER --like scaled_dot_product --format raw`:
//     cc -O2 -o read_vectors read_vectors.c -lm && ./read_vectors FOLDER CASE
// Prints the worst error / bound; exit status 1 if an element is outside its bound. For a little-endian machine.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *after(char *text, const char *word) {
    char *found = strstr(text, word); if (!found) { fprintf(stderr, "manifest.json: no %s\n", word); exit(2); }
    return found + strlen(word);
}

static void *content(const char *folder, const char *name) {
    char path[4096]; snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb"); if (!file) { perror(path); exit(2); }
    fseek(file, 0, SEEK_END); long size = ftell(file); rewind(file);
    char *data = calloc(size + 8, 1); if (!data || fread(data, 1, size, file) != (size_t)size) { perror(path); exit(2); }
    fclose(file); return data;
}

int main(int count, char **word) {
    if (count != 3) { fprintf(stderr, "usage: read_vectors FOLDER CASE\n"); return 2; }
    char text[4096], *manifest = content(word[1], "manifest.json");
    snprintf(text, sizeof text, "\"name\": \"%s\"", word[2]);
    char *about = after(manifest, text), *next = strstr(about, "\"name\": ");
    if (next) *next = 0;                // all that is looked up is of this case
    long n[2][8], rank = 0, outer = 1;  // the shapes of q and v
    for (int i = 0; i < 2; i++) {
        char *at = strchr(after(after(about, i ? "\"in/v\": " : "\"in/q\": "), "\"shape\": "), '[');
        for (rank = 0; *at != ']' && rank < 8; rank++) n[i][rank] = strtol(at + 1, &at, 10), at += strspn(at, " \n");
    }
    for (int i = 0; i < rank - 2; i++) outer *= n[0][i];
    long Q = n[0][rank - 2], D = n[0][rank - 1], K = n[1][rank - 2], E = n[1][rank - 1];
    char *at = after(about, "\"scale\": "), *causal = after(about, "\"is_causal\": ");
    float scale = *at != 'n' ? strtof(at, NULL) : 1 / sqrtf(D);
    snprintf(text, sizeof text, "%s/%s", word[1], word[2]);
    double *q = content(text, "in/q.bin"), *k = content(text, "in/k.bin"), *v = content(text, "in/v.bin");
    double *out = content(text, "out/out.bin"), *bound = content(text, "bound/float32/out.bin"), worst = 0;
    unsigned char *mask = strstr(about, "\"option/mask\"") ? content(text, "option/mask.bin") : NULL;
    float *p = malloc(K * sizeof *p + 1);
    for (long b = 0; b < outer; b++) for (long i = b * Q; i < (b + 1) * Q; i++) {
        float most = -INFINITY, sum = 0;
        for (long j = 0; j < K; j++) {
            int seen = (!mask || mask[i * K + j]) && !(*causal == 't' && j > i - b * Q);
            p[j] = seen ? 0 : -INFINITY;
            for (long d = 0; seen && d < D; d++) p[j] += (float)q[i * D + d] * (float)k[(b * K + j) * D + d];
            if (seen && (p[j] *= scale) > most) most = p[j];
        }
        for (long j = 0; j < K; j++) sum += p[j] = p[j] == -INFINITY ? 0 : expf(p[j] - most);
        for (long e = 0; e < E; e++) {
            float y = 0;
            for (long j = 0; j < K; j++) y += p[j] * (float)v[(b * K + j) * E + e];
            double expected = out[i * E + e], got = sum == 0 ? 0 : y / sum;
            double ratio = fabs(got - expected) / bound[i * E + e];
            if (got == expected || (isnan(got) && isnan(expected))) ratio = 0;  // NaN is right where it is expected
            if (isnan(ratio)) ratio = INFINITY;
            if (ratio > worst) worst = ratio;
        }
    }
    printf("%s: worst error / bound %.3g\n", word[2], worst);
    return !(worst <= 1);
}
