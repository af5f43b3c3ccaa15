"""The decoding loop: steps, trees and slots, for any backend."""
