// Numbers: how they are smoothed, spread over an axis and written. Nothing here knows of the page.

// The mean of each value and those of the steps before it, as far as they are among the last `window`.
function smooth(steps, values, window) {
  let [first, sum] = [0, 0];
  return values.map((value, i) => {
    sum += value;
    for (; steps[first] <= steps[i] - window; first++) sum -= values[first];
    return sum / (i - first + 1);
  });
}

// Round values from at most `low` to at least `high`, about `count` of them.
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

// The lowest and the highest of several lists of numbers, a little apart if they are the same.
function extent(lists, fromZero) {
  let [low, high] = [Infinity, -Infinity];
  for (const values of lists) {
    for (const value of values) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return [0, 1];
  if (fromZero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (low === high) {
    const room = Math.abs(low) / 2 || 0.5;
    return fromZero && low === 0 ? [0, 1] : [low - room, high + room];
  }
  return [low, high];
}

function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(share * (sorted.length - 1))];
}

// Four digits at most, in powers of ten where there would be many zeros.
function written(value, digits = 4) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) {
    const [digits_, power] = value.toExponential(digits - 2).split("e");
    return `${Number(digits_)}e${Number(power)}`;
  }
  return size >= 10 ** (digits - 1) ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)));
}

// The labels of an axis: all with as many digits as tell them apart.
function tickLabels(values) {
  const largest = Math.max(...values.map(Math.abs));
  const [unit, suffix] = largest >= 1e6 ? [1e6, "M"] : largest >= 1e4 ? [1e3, "k"] : [1, ""];
  if (largest > 0 && largest < 1e-3) return values.map((value) => written(value, 3));
  const step = values.length > 1 ? Math.abs(values[1] - values[0]) / unit : 1;
  const decimals = Math.min(6, Math.max(0, Math.ceil(-Math.log10(step) - 1e-9)));
  const exact = step * 10 ** decimals;
  const more = Math.abs(exact - Math.round(exact)) > 1e-6 ? 1 : 0;
  return values.map((value) => (value === 0 ? "0" : `${(value / unit).toFixed(decimals + more)}${suffix}`));
}

function signed(value, digits = 3) {
  return value > 0 ? `+${written(value, digits)}` : written(value, digits).replace("-", "−");
}

// The place in a rising list whose value is nearest.
function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle;
    else high = middle;
  }
  return value - sorted[low] <= sorted[high] - value ? low : high;
}
