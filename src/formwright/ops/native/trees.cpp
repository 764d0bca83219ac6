// A tree halved at pivots, level by level: the loops of ops/trees.py without arrays in between. Also the distances inside its leaves, and
// a counting sort. Nothing here is worth more than one thread: a tree of ten thousand nodes takes a millisecond or two.

#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#if defined(_WIN32)
#define FORMWRIGHT_EXPORT extern "C" __declspec(dllexport)
#else
#define FORMWRIGHT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

using Ints = std::vector<int64_t>;

enum Outcome : int64_t { done, out_of_memory, no_tree, out_of_room };

// The trees of a level, one after the other in preorder: where each node stands in the whole tree, and how many its subtree has here.
struct Level {
    Ints place, size, length;
};

// Nodes in preorder from node 0; a node's children come in the order of its arcs, beginning behind the one to its parent.
bool preorder(
    const int64_t *edges, const double *lengths, int64_t n, int64_t *node, int64_t *parent, int64_t *size, double *depth, double *weight
) {
    const int64_t m = n - 1;
    Ints first(n + 1, 0), arc(2 * m), next(n), left(n), at(n, -1), path;
    for (int64_t e = 0; e < 2 * m; ++e) ++first[edges[e] + 1];
    for (int64_t i = 0; i < n; ++i) first[i + 1] += first[i];
    for (int64_t i = 0; i < n; ++i) next[i] = first[i];
    // arc = the edge, or m + the edge the other way
    for (int64_t e = 0; e < m; ++e) arc[next[edges[2 * e]]++] = e;
    for (int64_t e = 0; e < m; ++e) arc[next[edges[2 * e + 1]]++] = m + e;
    for (int64_t i = 0; i < n; ++i) next[i] = first[i], left[i] = first[i + 1] - first[i];
    int64_t count = 0;
    node[0] = parent[0] = 0, depth[0] = weight[0] = 0.0, at[0] = count++;
    path.push_back(0);
    while (!path.empty()) {
        const int64_t place = path.back(), here = node[place];
        if (left[here] == 0) {
            size[place] = count - place;
            path.pop_back();
            continue;
        }
        --left[here];
        const int64_t a = arc[next[here]], e = a < m ? a : a - m, other = a < m ? edges[2 * e + 1] : edges[2 * e];
        next[here] = next[here] + 1 < first[here + 1] ? next[here] + 1 : first[here];
        if (at[other] >= 0) return false;
        at[other] = count, node[count] = other, parent[count] = place;
        weight[count] = lengths[e], depth[count] = depth[place] + lengths[e];
        // go on behind the way back
        const int64_t back = a < m ? a + m : a - m;
        for (int64_t k = first[other]; k < first[other + 1]; ++k)
            if (arc[k] == back) next[other] = k + 1 < first[other + 1] ? k + 1 : first[other];
        --left[other];
        path.push_back(count++);
    }
    return count == n;
}

struct Entries {
    const int64_t *node;
    int64_t *entry, *half;
    double *distance;
    int64_t count;
    void add(int64_t place, int64_t side, double far) { entry[count] = node[place], half[count] = side, distance[count++] = far; }
};

// Tree [s, s + n) of `level` into two, appended to `into`; both keep the pivot, which is no entry.
void halve(const Level &level, const double *depth, int64_t s, int64_t n, int64_t half, Level &into, Entries &entries, Ints &above) {
    const int64_t *place = level.place.data() + s, *size = level.size.data() + s;
    int64_t p = 0;
    for (int64_t i = 0; i < n; ++i)
        if (2 * size[i] > n) p = i;
    const int64_t end = p + size[p];
    int64_t cut = p + 1, best = -1;
    for (int64_t c = p + 1; c < end; c += size[c]) {
        const int64_t gap = 2 * (end - c) - (n - 1), uneven = gap < 0 ? -gap : gap;
        if (best < 0 || uneven < best) best = uneven, cut = c;
    }
    const double deep = depth[place[p]];
    const auto far = [&](int64_t i, int64_t common) {
        const double d = depth[place[i]] + deep - 2.0 * depth[place[common]];
        return d > 0.0 ? d : 0.0;
    };
    above.clear();
    for (int64_t i = 0; i < n; ++i) {
        const bool ancestor = i <= p && i + size[i] > p;
        if (ancestor) above.push_back(i);
        if (i >= cut && i < end) continue;
        while (above.back() + size[above.back()] <= i) above.pop_back();  // the last ancestor of the pivot that goes on here
        if (i != p) entries.add(place[i], half, far(i, above.back()));
        into.place.push_back(place[i]);
        into.size.push_back(ancestor ? size[i] - (end - cut) : size[i]);
    }
    into.length.push_back(n - (end - cut));
    into.place.push_back(place[p]);
    into.size.push_back(1 + end - cut);
    for (int64_t i = cut; i < end; ++i) {
        entries.add(place[i], half + 1, far(i, p));
        into.place.push_back(place[i]);
        into.size.push_back(size[i]);
    }
    into.length.push_back(1 + end - cut);
}

}  // namespace

// The tree of n nodes and the edges (n - 1, 2), rooted at node 0 and halved while a part has more than `leaf` nodes. Nodes in preorder:
// node, parent, size, depth, weight (n). Entries: entry, half, distance (room). Level of each half (room). Leaves: their nodes' places in
// preorder (room) and their lengths (room). counts = entries, halves, places in leaves, leaves.
FORMWRIGHT_EXPORT int64_t formwright_halve_tree(
    const int64_t *edges, const double *lengths, int64_t *node, int64_t *parent, int64_t *size, double *depth, double *weight,
    int64_t *entry, int64_t *half, double *distance, int64_t *level, int64_t *leaf_place, int64_t *leaf_length, int64_t *counts, int64_t n,
    int64_t leaf, int64_t room
) {
    try {
        if (!preorder(edges, lengths, n, node, parent, size, depth, weight)) return no_tree;
        Level now, then;
        for (int64_t i = 0; i < n; ++i) now.place.push_back(i), now.size.push_back(size[i]);
        now.length.push_back(n);
        Entries entries{node, entry, half, distance, 0};
        Ints above;
        int64_t halves = 0, places = 0, leaves = 0;
        for (int64_t depth_of = 0; !now.length.empty(); ++depth_of) {
            const int64_t more = static_cast<int64_t>(now.place.size());
            if (entries.count + more > room || places + more > room) return out_of_room;
            then.place.clear(), then.size.clear(), then.length.clear();
            int64_t s = 0;
            for (const int64_t length : now.length) {
                if (length <= leaf) {
                    leaf_length[leaves++] = length;
                    for (int64_t i = 0; i < length; ++i) leaf_place[places++] = now.place[s + i];
                } else {
                    level[halves] = level[halves + 1] = depth_of;
                    halve(now, depth, s, length, halves, then, entries, above);
                    halves += 2;
                }
                s += length;
            }
            std::swap(now, then);
        }
        counts[0] = entries.count, counts[1] = halves, counts[2] = places, counts[3] = leaves;
        return done;
    } catch (const std::bad_alloc &) {
        return out_of_memory;
    }
}

// Nodes (leaves, most), -1 where there is none, and mutual distances (leaves, most, most) of the leaves.
FORMWRIGHT_EXPORT int64_t formwright_leaf_distances(
    const int64_t *place, const int64_t *length, const int64_t *node, const int64_t *parent, const double *weight, int64_t *nodes,
    double *within, int64_t leaves, int64_t most
) {
    for (int64_t l = 0; l < leaves; ++l, ++length, nodes += most, within += most * most) {
        for (int64_t j = 0; j < most; ++j) {
            const bool there = j < *length;
            nodes[j] = there ? node[place[j]] : -1;
            int64_t above = j - 1;  // places rise: the parent is not far behind
            while (there && above > 0 && place[above] != parent[place[j]]) --above;
            for (int64_t i = 0; i < j; ++i) {
                const double d = there ? within[above * most + i] + weight[place[j]] : 0.0;
                within[j * most + i] = within[i * most + j] = d;
            }
            within[j * most + j] = 0.0;
        }
        place += *length;
    }
    return done;
}

// A stable counting sort of n keys from 0 to count - 1: their order, and where each key begins (count + 1).
FORMWRIGHT_EXPORT int64_t formwright_counting_sort(const int64_t *key, int64_t *order, int64_t *begin, int64_t n, int64_t count) {
    for (int64_t k = 0; k <= count; ++k) begin[k] = 0;
    for (int64_t i = 0; i < n; ++i) ++begin[key[i]];
    int64_t sum = 0;
    for (int64_t k = 0; k <= count; ++k) {
        const int64_t here = begin[k];
        begin[k] = sum;
        sum += here;
    }
    for (int64_t i = 0; i < n; ++i) order[begin[key[i]]++] = i;
    for (int64_t k = count; k > 0; --k) begin[k] = begin[k - 1];
    begin[0] = 0;
    return done;
}
