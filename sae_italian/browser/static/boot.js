// The start of the page that opens from disk: the last part of the script that the export makes of these modules.
import { mount } from "./main.js";
import { diskSource, receive } from "./disk.js";

window.saeItalian = { receive };
mount(document.getElementById("app"), diskSource());
