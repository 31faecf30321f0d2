"""The columns of `view_parameters`: one float32 row per view that describes how its crop becomes the view."""

FLIP = 0  # 1: swap left and right
JITTER = 1  # 1: apply the four operators of colour jitter; factors and order have no meaning otherwise
FACTORS = 2  # four columns: brightness, contrast, saturation (1 is neutral), hue (0 is neutral)
ORDER = 6  # four columns: the operator that comes first, second, third, last, numbered as the factors
GRAYSCALE = 10  # 1: convert to grayscale
SIGMA = 11  # standard deviation of the blur in pixels; 0: no blur
NUM_PARAMETERS = 12

# two more columns, of transforms that solarize or equalize
SOLARIZE = 12  # values of at least this, in 0..1, are inverted; above 1: none
EQUALIZE = 13  # 1: equalize the histogram of each channel

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
BLUR_REACH = 4  # half-width of the blur's kernel in standard deviations, rounded up to whole pixels
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue in a gray value, as in torchvision
