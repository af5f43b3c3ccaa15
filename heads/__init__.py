"""Medusa heads, their trees and the reference decoding: what every other package shares."""
