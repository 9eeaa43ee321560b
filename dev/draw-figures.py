#!/usr/bin/env python3
"""Draws the figures of dev/bench-peers.sh as SVG: draw-figures.py FIGURES.TSV >figures.svg

A line of the input is a work and the seconds that Backhaul, Cinder, restic and borg took for it, `-` for those that did not
do it, with tabs between.
"""
import sys
from html import escape

PEERS = [('Backhaul', '#1f6f8b'), ('Cinder', '#d1495b'), ('restic', '#8d99ae'), ('borg', '#c9ada7')]
WIDTH, LABEL, BAR, GAP, HEAD = 860, 330, 14, 16, 46


def main():
    with open(sys.argv[1]) as lines:
        rows = [line.rstrip('\n').split('\t') for line in lines if line.strip()]
    parts, y = [], HEAD
    for index, (name, color) in enumerate(PEERS):
        x = LABEL + index * 110
        parts.append(f'<rect x="{x}" y="12" width="14" height="14" fill="{color}"/>'
                     f'<text x="{x + 20}" y="24">{name}</text>')
    for work, *seconds in rows:
        known = [(peer, float(took)) for peer, took in zip(PEERS, seconds) if took != '-']
        longest = max(took for _, took in known)
        parts.append(f'<text x="{LABEL - 10}" y="{y + 12}" text-anchor="end">{escape(work)}</text>')
        for (_, color), took in known:
            # Each work has a scale of its own: it is the ratio that counts.
            width = max(2, (WIDTH - LABEL - 80) * took / longest)
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{width:.0f}" height="{BAR}" fill="{color}"/>'
                         f'<text x="{LABEL + width + 6:.0f}" y="{y + 12}" class="small">{took:.2f} s</text>')
            y += BAR + 2
        y += GAP
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
          f'role="img" aria-label="Seconds for the same work, of Backhaul, Cinder, restic and borg">')
    print('<style>text { font: 13px sans-serif; fill: #222 } .small { font-size: 11px }</style>')
    print(f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>')
    print('\n'.join(parts))
    print('</svg>')


main()
